"""Quantization recipes: what they store, how every mode runs, their cost on Janus-Tiny."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

import mlx_janus
from benchmarks.recipes import Comparison, plans
from mlx_janus.commands import convert as convert_command
from mlx_janus.config import (
    BITS,
    GROUP_SIZES,
    RECIPES,
    GenHeadConfig,
    ImageConfig,
    JanusConfig,
    LayerBits,
    LlamaConfig,
    MLPConfig,
    SiglipConfig,
    VQConfig,
    VQGenerationConfig,
)
from mlx_janus.errors import ConfigError, OptionError, OutOfMemoryError
from mlx_janus.evaluation.divergence import kl_divergence, mean_divergence, overlap, top1_agreement
from mlx_janus.models.janus import JanusModel
from mlx_janus.weights import convert as convert_module
from mlx_janus.weights import footprint
from mlx_janus.weights import quantize as quantize_module
from mlx_janus.weights.convert import ConvertOptions, Source, convert_checkpoint
from mlx_janus.weights.footprint import required_memory
from mlx_janus.weights.load import load_model, with_quantization
from mlx_janus.weights.quantize import (
    Precision,
    Rule,
    bits_per_weight,
    plan_by_rule,
    plan_quantization,
    quantize_array,
    quantize_model,
)
from mlx_janus.weights.sources import TINY, find_converted
from mlx_janus.weights.verify import verify_conversion
from tests.support.golden import FIXTURES, rms_error
from tests.support.programs import call

PRO = FIXTURES / "deepseek-pro-bin"
SOURCE = Source(PRO, PRO.name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fixture folder, converted by every recipe."""
    root = tmp_path_factory.mktemp("recipes")
    for name in RECIPES:
        convert_checkpoint(SOURCE, root / name, ConvertOptions(recipe=name))
    return {name: root / name for name in RECIPES}


@pytest.fixture(scope="module")
def tiny() -> Comparison:
    return Comparison(TINY, pictures=6)


# Divergence


def test_divergences_are_those_of_the_formulas() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.6, 0.1])
    rows = (
        mx.array(np.log([p, p]) + 5.0),
        mx.array(np.log([q, p])),
    )  # logits are log-probabilities and a constant
    kl = 0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.6)
    assert np.allclose(kl_divergence(*rows), [kl, 0.0], atol=1e-6)
    assert np.allclose(overlap(*rows), [0.6, 1.0], atol=1e-6)
    assert np.array_equal(top1_agreement(*rows), [0.0, 1.0])


def test_means_are_over_positions_and_not_over_pairs() -> None:
    far, near = (
        (mx.array([[0.0, 3.0]]), mx.array([[3.0, 0.0]])),
        (mx.zeros((3, 2)), mx.zeros((3, 2))),
    )
    measured = mean_divergence([far, near])
    assert measured.top1 == 0.75
    assert math.isclose(measured.kl, float(kl_divergence(*far)[0]) / 4, rel_tol=1e-6)


# The rule


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_quantizes_the_language_model_and_is_careful_beside_image_tokens(
    name: str,
) -> None:
    plan = plan_quantization(JanusConfig.load(TINY / "config.json"), recipe=name)
    assert plan is not None
    assert plan.recipe == name
    layers = {layer.path: layer for layer in plan.layers}
    assert sum(path.startswith("language_model.") for path in layers) == 5 * 7 + 1
    modes = {layer.mode for path, layer in layers.items() if path.startswith("language_model.")}
    assert modes == {name if name in ("mxfp4", "mxfp8", "nvfp4") else "affine"}
    beside = {
        (layer.mode, layer.bits)
        for path, layer in layers.items()
        if not path.startswith("language_model.")
    }
    assert beside == {"light": {("affine", 6)}, "faithful": set()}.get(name, {("affine", 8)})


def test_a_group_that_does_not_divide_gives_way_to_the_next_of_its_mode_or_to_float() -> None:
    config = JanusConfig.load(TINY / "config.json")  # 192 wide, 416 within the MLP
    groups = {}
    for mode, size in (("affine", 128), ("mxfp4", 32), ("nvfp4", 16)):
        plan = plan_by_rule(config, Rule(Precision(4, size, mode), Precision(8)))
        of = {layer.path.rpartition(".")[2]: layer.group_size for layer in plan.layers}
        groups[mode] = of["q_proj"], of["down_proj"]
    assert groups == {"affine": (64, 32), "mxfp4": (32, 32), "nvfp4": (16, 16)}
    narrow = plan_quantization(JanusConfig.load(TINY / "config.json"), recipe="nvfp4")
    assert narrow is not None
    assert narrow.kept_float == ("gen_aligner.layers.0",)  # 8 wide


def odd_config() -> JanusConfig:
    """A config with a hidden size and a vocabulary that most groups do not divide."""
    return JanusConfig(
        understanding=SiglipConfig("siglip", 16, 8, 32, 1, 2, 32),
        aligner=MLPConfig("mlp_gelu", 32, 144),
        language=LlamaConfig("llama", 777, 144, 256, 1, 6, 6, 24, 512),
        generation=VQGenerationConfig(
            "vq",
            16,
            VQConfig("vq", 49, 16, 8, (1, 1), 1, 8, norm_groups=4),
            MLPConfig("mlp_gelu", 16, 144),
            GenHeadConfig("vision_head", 144, 48, 49),
        ),
        image=ImageConfig(16),
    )


@pytest.mark.parametrize(
    "wanted",
    [
        *({"recipe": name} for name in RECIPES),
        *({"bits": b, "group_size": g} for b in BITS for g in GROUP_SIZES),
    ],
    ids=str,
)
def test_a_layer_that_mlx_cannot_pack_stays_float(wanted: dict[str, Any]) -> None:
    """MLX raises a ValueError for odd numbers of groups of 16."""
    model = JanusModel(odd_config())
    plan = plan_quantization(model.config, **wanted)
    assert plan is not None
    quantize_model(model, plan)
    mx.eval(model.parameters())
    assert np.isfinite(model.text_logits(model.embed_text(mx.array([[1, 2]])))).all()
    head = "language_model.lm_head"  # 777 rows of 9 groups of 16, an odd number
    assert head in (plan.kept_float or ())
    listed = (LayerBits(head, 4, 16, "nvfp4"),)
    with pytest.raises(ConfigError, match="is off"):
        quantize_model(JanusModel(odd_config()), replace(plan, layers=listed))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_keeps_small_weights_of_every_layer(name: str) -> None:
    """Measured for each layer: no mode loses more than its share, however small the weights."""
    config = JanusConfig.load(TINY / "config.json")
    plan = plan_quantization(config, recipe=name)
    assert plan is not None
    widths = {
        path: m.weight.shape[-1]
        for path, m in JanusModel(config).named_modules()
        if isinstance(m, nn.Linear)
    }
    for layer in plan.layers:
        weight = mx.random.normal((32, widths[layer.path]), key=mx.random.key(0)) * 0.001
        parts = quantize_array(weight, layer)
        scale = parts.pop("layer_scale", 1.0)
        options = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        read = mx.dequantize(*parts.values(), **options).astype(mx.float32) * scale
        assert rms_error(read, weight) < (0.13 if layer.bits == 4 else 0.04), layer


def test_bits_store_what_they_stored_before_there_were_recipes(tmp_path: Path) -> None:
    convert_checkpoint(SOURCE, tmp_path / "out", ConvertOptions(bits=4))
    data = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert set(data) == {"layers", "bits", "group_size", "kept_float"}
    assert {tuple(layer) for layer in data["layers"]} == {("path", "bits", "group_size")}


def test_bits_of_a_weight_count_scales() -> None:
    assert bits_per_weight(LayerBits("x", 4, 64)) == 4.5
    assert bits_per_weight(LayerBits("x", 4, 64), 32) == 5.0
    assert bits_per_weight(LayerBits("x", 4, 16, "nvfp4")) == 4.5


# Folders


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_draws_answers_and_verifies(name: str, folders: dict[str, Path]) -> None:
    janus = mlx_janus.load(folders[name])
    assert janus.config.quantization is not None
    assert janus.config.quantization.recipe == name
    assert len(janus.generate_images("a fox", seed=1)[0].tokens) == 16
    assert janus.generate_text("Hello?", max_tokens=4).tokens
    assert verify_conversion(SOURCE, folders[name]) == len(
        mx.load(str(folders[name] / "model.safetensors"))
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_at_loading_gives_what_it_gives_at_conversion(
    name: str, folders: dict[str, Path], converted: dict[str, Path]
) -> None:
    late = dict(
        tree_flatten(load_model(converted[PRO.name], recipe=name, dtype="bfloat16").parameters())
    )
    early = dict(
        tree_flatten(load_model(folders[name], recipe=name, dtype="bfloat16").parameters())
    )
    assert early.keys() == late.keys()
    for path, array in early.items():
        assert mx.array_equal(array, late[path]).item(), path


@pytest.mark.parametrize("name", ["light", "mxfp8", "nvfp4"])
def test_the_space_and_the_memory_of_a_recipe_are_foreseen(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = mx.load(str(folders[name] / "model.safetensors"))
    asked: list[int] = []
    monkeypatch.setattr(convert_module, "_check_space", lambda _, needed: asked.append(needed))
    convert_checkpoint(SOURCE, tmp_path / "out", ConvertOptions(recipe=name))
    assert asked == [sum(array.nbytes for array in stored.values())]
    weights = sum(
        a.nbytes
        for path, a in stored.items()
        if path.startswith(("language_model.", "vision_model."))
    )
    needed = required_memory(JanusConfig.load(folders[name] / "config.json"), "bfloat16")[
        "answering"
    ]
    assert weights < needed < weights + 4_000_000


def test_a_damaged_mode_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = JanusConfig.load(folders["mxfp4"] / "config.json")
    assert config.quantization is not None
    data = config.to_dict()
    data["quantization"]["layers"][-1]["mode"] = "fp4"
    with pytest.raises(ConfigError, match="mode must be 'affine' or 'mxfp4'"):
        JanusConfig.from_dict(data)
    data["quantization"]["layers"][-1]["mode"] = "nvfp4"  # whose groups are of 16
    plan = JanusConfig.from_dict(data).quantization
    assert plan is not None
    with pytest.raises(ConfigError, match=r"groups of 32 \(nvfp4\) is off"):
        quantize_model(JanusModel(config), plan)


def test_only_nvfp4_has_scales_of_layers_and_folders_without_them_still_load(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, folder in folders.items():
        arrays = mx.load(str(folder / "model.safetensors"))
        assert any(path.endswith(".layer_scale") for path in arrays) == (name == "nvfp4")
    plan = JanusConfig.load(folders["nvfp4"] / "config.json").quantization
    assert plan is not None
    plain = replace(plan, layers=tuple(replace(layer, scaled=False) for layer in plan.layers))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:  # as an earlier release converted
        patch.setattr(quantize_module, "_SCALED_MODES", ())
        convert_checkpoint(SOURCE, tmp_path / "old", ConvertOptions(recipe="nvfp4"))
    assert JanusConfig.load(tmp_path / "old" / "config.json").quantization == plain
    assert mlx_janus.load(tmp_path / "old").generate_text("Hello?", max_tokens=2).tokens
    affine = replace(plan.layers[0], mode="affine", bits=4, group_size=32, scaled=True)
    config = JanusConfig.load(folders["mxfp4"] / "config.json")
    with pytest.raises(ConfigError, match="is off"):
        quantize_model(JanusModel(config), replace(plan, layers=(affine,)))


# Asking for one


def test_bits_and_a_recipe_do_not_go_together(converted: dict[str, Path], tmp_path: Path) -> None:
    for wanted, words in (
        ({"bits": 4, "recipe": "light"}, "give one"),
        ({"recipe": "heavy"}, "recipe must be one of"),
    ):
        for source in (PRO, converted[PRO.name]):
            with pytest.raises(OptionError, match=words):
                mlx_janus.load(source, **wanted)
        with pytest.raises(OptionError, match=words):
            convert_checkpoint(SOURCE, tmp_path / "out", ConvertOptions(**wanted))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wanted", [{"recipe": "light"}, {"bits": 4}, {"bits": 8}])
def test_a_folder_of_another_recipe_is_refused(
    wanted: dict[str, Any], folders: dict[str, Path]
) -> None:
    with pytest.raises(OptionError, match="has the recipe balanced, not"):
        mlx_janus.load(folders["balanced"], **wanted)


def test_a_recipe_for_a_folder_of_bits_is_refused(tmp_path: Path) -> None:
    convert_checkpoint(SOURCE, tmp_path / "out", ConvertOptions(bits=4))
    with pytest.raises(OptionError, match="has 4 bits, not the recipe light"):
        mlx_janus.load(tmp_path / "out", recipe="light")


def test_the_cache_tells_recipes_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_JANUS_CACHE", str(tmp_path))
    wanted: list[dict[str, Any]] = [{}, {"bits": 4}, {"recipe": "light"}, {"recipe": "nvfp4"}]
    made = [find_converted(PRO, **options) for options in wanted]
    assert len(set(made)) == len(wanted)
    assert [find_converted(PRO, **options) for options in wanted] == made
    assert f"{PRO.name}-light-" in made[2].name


def test_where_memory_is_short_the_recipe_that_fits_is_named(
    converted: dict[str, Path], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JanusConfig.load(converted[PRO.name] / "config.json")
    sizes = [
        max(required_memory(with_quantization(config, bits, PRO, recipe), "float32").values())
        for bits, recipe in ((4, None), (None, "light"))
    ]
    assert sizes[1] < sizes[0]
    monkeypatch.setattr(footprint, "available_memory", lambda: sum(sizes) // 2)
    whole = footprint.required_memory  # as if low memory spared nothing, which would be named first
    monkeypatch.setattr(
        footprint, "required_memory", lambda config, dtype, **_: whole(config, dtype)
    )
    for source, wanted in (
        (PRO, {}),
        (converted[PRO.name], {"bits": 8}),
        (PRO, {"recipe": "faithful"}),
    ):
        with pytest.raises(OutOfMemoryError, match=r'recipe="light" needs .* and fits'):
            mlx_janus.load(source, dtype="float32", **wanted)
    assert mlx_janus.load(PRO, recipe="light", dtype="float32")
    with pytest.raises(
        OutOfMemoryError, match="smaller model"
    ):  # stored so: no option makes it smaller
        mlx_janus.load(folders["faithful"], dtype="float32")


def test_the_commands_take_recipes(tmp_path: Path) -> None:
    done = call(convert_command.main, PRO, tmp_path / "out", "--recipe", "balanced")
    assert done.code == 0
    assert "layers by the recipe balanced." in done.stderr
    assert call(convert_command.main, PRO, tmp_path / "out", "--verify").code == 0


# Janus-Tiny


def test_layers_that_are_measured_alone_are_all_layers(tiny: Comparison) -> None:
    compared = plans(tiny.janus.config, sensitivity=True)
    alone = [layer.path for name, plan in compared.items() if ":" in name for layer in plan.layers]
    assert sorted(alone) == [layer.path for layer in compared["4 bits"].layers]


def test_the_recipes_of_janus_tiny_stand_in_their_order(tiny: Comparison) -> None:
    """From light by balanced to faithful the distribution comes closer, and weights take more."""
    config = tiny.janus.config
    plans = [plan_quantization(config, recipe=name) for name in ("light", "balanced", "faithful")]
    drawing, answering = zip(*map(tiny.divergences, plans), strict=True)
    assert drawing[0].kl > drawing[1].kl > drawing[2].kl > 0
    assert drawing[0].overlap < drawing[1].overlap < drawing[2].overlap < 1
    assert answering[0].kl > answering[2].kl
    sizes = [tiny.drawing_bytes(plan) for plan in [*plans, None]]
    assert sizes == sorted(set(sizes))
