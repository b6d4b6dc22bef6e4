"""Converting and loading JanusFlow, whose autoencoder is a repository of its own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_janus
from mlx_janus.config import FlowGenerationConfig, JanusConfig
from mlx_janus.errors import CheckpointError, ConfigError, OptionError, UnsupportedModelError
from mlx_janus.models.janus import JanusModel, keeps_type
from mlx_janus.processing.prompts import Prompts
from mlx_janus.weights.checkup import find_faults
from mlx_janus.weights.convert import Source, convert_checkpoint
from mlx_janus.weights.folder import open_converted
from mlx_janus.weights.published import read_published, read_published_sizes
from mlx_janus.weights.save import save_model
from mlx_janus.weights.sources import SHORT_NAMES, find_converted, find_source
from mlx_janus.weights.vae_files import VAE_PREFIX, vae_tensors
from mlx_janus.weights.verify import verify_conversion
from tests.support.fake_hub import FakeHub
from tests.support.flow import NAME, PROMPT, VAE, convert_flow, noise, source, want
from tests.support.golden import FIXTURES, rms_error

pytestmark = pytest.mark.check
FOLDER = FIXTURES / NAME
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the source, to be changed."""
    return Path(shutil.copytree(FOLDER, tmp_path / "source"))


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """A copy of the autoencoder, to be changed."""
    return Path(shutil.copytree(VAE, tmp_path / "vae"))


def change(path: Path, **values: Any) -> None:
    """Change entries of a JSON file; a value None removes the entry."""
    data = json.loads(path.read_text()) | values
    data = {name: value for name, value in data.items() if value is not None}
    path.write_text(json.dumps(data))


# The published sizes


def published_shapes(file: str) -> dict[str, list[int]]:
    lines = (FIXTURES / file).read_text().splitlines()
    return {
        line.split()[0]: json.loads(line[line.index("[") :])
        for line in lines
        if not line.startswith("#")
    }


def stored_name(name: str) -> str:
    """The name in JanusFlow's file of one of our parameters."""
    if name == "aligner.begin":
        return "beg_of_und_embed"
    name = re.sub(r"^aligner\.linear\.", "vision_und_enc_aligner.", name)
    return re.sub(r"^vision_model\.", "vision_und_enc_model.", name)


def test_the_published_config_gives_the_published_tensors() -> None:
    config, layout = read_published_sizes(FIXTURES / "config_janusflow_1.3b.json")
    assert layout == "janusflow"
    flow = config.generation
    assert isinstance(flow, FlowGenerationConfig)
    assert (flow.positions, flow.latent_shape, flow.steps, flow.cfg_weight) == (
        576,
        (48, 48, 4),
        30,
        2.0,
    )
    assert config.embeddings_per_image == 577
    ours = dict(tree_flatten(JanusModel(config).parameters()))
    shapes = published_shapes("keys_janusflow_1.3b.txt")
    used = {name: shape for name, shape in shapes.items() if ".attn_pool." not in name}
    vae = {name for name in ours if name.startswith(VAE_PREFIX)}
    assert {stored_name(name) for name in ours if name not in vae} == set(used)
    for name in set(ours) - vae:
        shape = [side for side in used[stored_name(name)] if side != 1]
        assert sorted(side for side in ours[name].shape if side != 1) == sorted(shape), name
    decoder = [
        shape
        for name, shape in published_shapes("keys_sdxl_vae.txt").items()
        if name.startswith(("decoder.", "post_quant_conv."))
    ]
    assert len(vae) == len(decoder) == 140
    assert sum(ours[name].size for name in vae) == sum(int(np.prod(s)) for s in decoder)


def test_the_names_of_the_autoencoder() -> None:
    config, _ = read_published_sizes(FOLDER / "config.json", VAE)
    expected = {name for name, _ in tree_flatten(JanusModel(config).parameters())}
    assert set(vae_tensors(VAE)) == {name for name in expected if name.startswith(VAE_PREFIX)}


# Conversion


def test_the_folder_holds_everything(flow_folder: Path) -> None:
    data = json.loads((flow_folder / "config.json").read_text())
    assert data["format_version"] == 2
    assert data["aligner"] == {"kind": "begun_linear", "input_dim": 48, "output_dim": 64}
    assert data["generation"]["kind"] == "flow"
    assert data["generation"]["vae"]["scaling_factor"] == 0.13025
    assert verify_conversion(source(), flow_folder) == 273
    _, stamp = open_converted(flow_folder)
    assert stamp["vae"] == "sdxl-vae"
    hashed = json.loads(stamp["source_sha256"])
    assert {"vae/config.json", f"vae/{WEIGHTS}", "model.safetensors"} <= set(hashed)
    arrays = mx.load(str(flow_folder / "model.safetensors"))
    assert arrays["vae.decoder.conv_in.weight"].dtype == mx.float32  # type: ignore[index,call-overload]
    assert arrays["vision_gen_enc_aligner.weight"].dtype == mx.bfloat16  # type: ignore[index,call-overload]


def test_another_type_leaves_the_autoencoder_as_it_is(tmp_path: Path) -> None:
    folder = convert_flow(tmp_path / "half", dtype="float16")
    config = JanusConfig.load(folder / "config.json")
    for name, array in mx.load(str(folder / "model.safetensors")).items():  # type: ignore[union-attr]
        assert array.dtype == (mx.float32 if keeps_type(config, name) else mx.float16)


def test_a_changed_autoencoder_is_noticed(flow_folder: Path, vae: Path) -> None:
    arrays = mx.load(str(vae / WEIGHTS))
    assert isinstance(arrays, dict)
    arrays["decoder.conv_in.bias"] = arrays["decoder.conv_in.bias"] + 1
    mx.save_safetensors(str(vae / WEIGHTS), arrays)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(vae / WEIGHTS))} is not the file"):
        verify_conversion(find_source(FOLDER, vae=vae), flow_folder)


def test_a_model_in_memory_is_saved_and_loaded(flow: Any, tmp_path: Path) -> None:
    save_model(flow.model, flow.tokenizer.to_str(), tmp_path / "out", dtype="float32", source="me")
    again = mlx_janus.load(tmp_path / "out")
    assert again.config.generation == flow.config.generation
    first, second = (
        janus.generate_images(PROMPT, steps=2, latents=noise()[:1])[0] for janus in (flow, again)
    )
    assert rms_error(second.latents, first.latents) == 0


def test_loading_converts_once(vae: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_JANUS_CACHE", str(tmp_path / "cache"))
    first = find_converted(FOLDER, vae=vae)
    assert find_converted(FOLDER, vae=vae, progress=lambda *_: pytest.fail("again")) == first
    arrays = mx.load(str(vae / WEIGHTS))
    assert isinstance(arrays, dict)
    arrays["decoder.conv_out.bias"] = arrays["decoder.conv_out.bias"] + 1
    mx.save_safetensors(str(vae / WEIGHTS), arrays)
    second = find_converted(FOLDER, vae=vae)
    assert second != first
    stored = mx.load(str(second / "model.safetensors"))
    assert mx.array_equal(
        stored["vae.decoder.conv_out.bias"],
        arrays["decoder.conv_out.bias"],  # type: ignore[index,call-overload]
    )


def test_the_hub_gives_model_and_autoencoder(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.add("deepseek-ai/JanusFlow-1.3B", FOLDER)
    fake_hub.add("stabilityai/sdxl-vae", VAE)
    assert SHORT_NAMES["janusflow-1.3b"] == "deepseek-ai/JanusFlow-1.3B"
    janus = mlx_janus.load("janusflow-1.3b")
    (image,) = janus.generate_images(PROMPT, steps=3, cfg_weight=1, latents=noise()[:1])
    reference = want()["flow.final_w1_steps3"][0].transpose(1, 2, 0)
    assert rms_error(image.latents, reference) < 3e-5
    assert image.metadata["model"] == "deepseek-ai/JanusFlow-1.3B"
    fake_hub.stop()
    assert mlx_janus.load("janusflow-1.3b").config == janus.config  # offline, from the caches


def test_another_autoencoder_is_refused_before_weights_come(fake_hub: FakeHub, vae: Path) -> None:
    change(vae / "config.json", scaling_factor=0.18215)
    fake_hub.add("deepseek-ai/JanusFlow-1.3B", FOLDER)
    fake_hub.add("someone/sd-vae", vae)
    with pytest.raises(UnsupportedModelError, match="Stable Diffusion 1 and not SDXL's"):
        mlx_janus.load("deepseek-ai/JanusFlow-1.3B", vae="someone/sd-vae")
    assert not any("safetensors" in path for path in fake_hub.downloads())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scaling_factor": 0.18215}, "that of Stable Diffusion 1 and not SDXL's"),
        ({"scaling_factor": None}, "that of Stable Diffusion 1 and not SDXL's"),
        ({"scaling_factor": 1.5305}, "scaling_factor 1.5305, not SDXL's"),
        ({"scaling_factor": 1}, "not SDXL's"),
        ({"_class_name": "AutoencoderTiny"}, "of 'AutoencoderTiny', not of an AutoencoderKL"),
        ({"act_fn": "relu"}, "act_fn 'relu' in its autoencoder"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv False"),
        ({"latents_mean": [0.5]}, "latents_mean"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"]}, "only 'UpDecoderBlock2D'"),
        ({"latent_channels": 16}, "latents of 4 channels, and the autoencoder has 16"),
    ],
)
def test_other_autoencoders_are_refused(vae: Path, values: dict[str, Any], message: str) -> None:
    change(vae / "config.json", **values)
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        read_published(FOLDER, vae=vae)


def test_a_scale_beyond_all_numbers_is_refused(vae: Path) -> None:
    change(vae / "config.json", scaling_factor=10**400)
    with pytest.raises(ConfigError, match="beyond 64 bits"):
        read_published(FOLDER, vae=vae)


def renamed(vae: Path, rename: Callable[[str], str]) -> None:
    """Rename the tensors of an autoencoder."""
    arrays = mx.load(str(vae / WEIGHTS))
    assert isinstance(arrays, dict)
    mx.save_safetensors(str(vae / WEIGHTS), {rename(name): a for name, a in arrays.items()})


def test_older_names_of_attention_are_read(vae: Path, tmp_path: Path, flow_folder: Path) -> None:
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed(vae, lambda name: re.sub("|".join(older), lambda found: older[found[0]], name))
    convert_checkpoint(find_source(FOLDER, vae=vae), tmp_path / "out")
    arrays = mx.load(str(tmp_path / "out/model.safetensors"))
    for name, array in mx.load(str(flow_folder / "model.safetensors")).items():  # type: ignore[union-attr]
        assert mx.array_equal(array, arrays[name])  # type: ignore[index,call-overload]


def test_files_that_are_no_autoencoder(vae: Path, tmp_path: Path) -> None:
    renamed(vae, lambda name: name.replace("up_blocks", "up").replace("resnets", "block"))
    with pytest.raises(CheckpointError, match="names of the original autoencoder"):
        vae_tensors(vae)
    (vae / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="stabilityai/sdxl-vae"):
        find_converted(FOLDER, vae=vae)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        find_converted(FOLDER, vae=tmp_path / "empty")
    with pytest.raises(CheckpointError, match="autoencoder elsewhere"):
        convert_checkpoint(Source(FOLDER, NAME), tmp_path / "out")


def test_an_autoencoder_for_a_model_without_one(flow_folder: Path) -> None:
    with pytest.raises(OptionError, match=r"needs no other autoencoder: leave vae=\.\.\. out"):
        mlx_janus.load(FIXTURES / "deepseek-pro-bin", vae=VAE)
    with pytest.raises(OptionError, match=r"is converted already: leave vae=\.\.\. out"):
        mlx_janus.load(flow_folder, vae=VAE)


# The config


@pytest.mark.parametrize(
    ("section", "values", "error", "message"),
    [
        ("vision_gen_enc_config", {"kernel_size": None}, ConfigError, "'kernel_size' is missing"),
        ("vision_gen_enc_config", {"stride": 4}, UnsupportedModelError, "stride 4"),
        ("vision_gen_enc_config", {"padding": 1}, UnsupportedModelError, "padding 1"),
        ("vision_gen_enc_config", {"input_channels": 8}, UnsupportedModelError, "8 channels"),
        ("vision_gen_enc_config", {"block_out_channels": [40, 80]}, UnsupportedModelError, "leve"),
        ("vision_gen_dec_config", {"upsamples": 2}, UnsupportedModelError, "kernel_size 2"),
        ("vision_gen_dec_config", {"in_channels": 48}, UnsupportedModelError, "in_channels 48"),
        ("vision_gen_dec_config", {"hidden_size": 32}, UnsupportedModelError, "hidden_size 32"),
        ("vision_gen_dec_config", {"norm_eps": 1e-5}, UnsupportedModelError, "norm_eps"),
        ("vision_und_enc_config", {"select_layer": -2}, UnsupportedModelError, "select_layer -2"),
    ],
)
def test_impossible_sizes_are_refused(
    copy: Path, section: str, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    data = json.loads((copy / "config.json").read_text())
    params = data[section]["params"] | values
    data[section]["params"] = {key: value for key, value in params.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(data))
    with pytest.raises(error, match=message):
        read_published(copy, vae=VAE)


def test_unknown_options_are_told(copy: Path) -> None:
    assert read_published(copy, vae=VAE).notes == ()
    data = json.loads((copy / "config.json").read_text())
    data["vision_gen_enc_config"]["params"]["turbo"] = 1
    (copy / "config.json").write_text(json.dumps(data))
    (note,) = read_published(copy, vae=VAE).notes
    assert "vision_gen_enc_config.params.turbo" in note


def test_mean_and_deviation_are_the_preprocessors(copy: Path) -> None:
    change(copy / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    image = read_published(copy, vae=VAE).config.image
    assert (image.mean, image.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# Tags


def ids_of(folder: Path, output: Path) -> dict[str, int]:
    convert_checkpoint(find_source(folder, vae=VAE), output)
    config = JanusConfig.load(output / "config.json")
    special = Prompts.load(output, config.prompt, image_tokens=1).special
    return vars(special)


def test_missing_tags_are_added_in_the_processors_order(copy: Path, tmp_path: Path) -> None:
    ids = ids_of(copy, tmp_path / "out")
    expected = {"bos": 520, "eos": 521, "image": 523, "image_start": 524, "image_end": 525}
    assert ids == expected | {"pad": 521}
    # A tokenizer without the tag of generation gets it second.
    data = json.loads((copy / "tokenizer.json").read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] != 522]
    (copy / "tokenizer.json").write_text(json.dumps(data))
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        change(copy / file, additional_special_tokens=[])
    ids = ids_of(copy, tmp_path / "second")
    assert (ids["image"], ids["image_start"], ids["image_end"]) == (522, 524, 525)


def test_tags_are_read_from_the_processor(copy: Path, tmp_path: Path) -> None:
    change(copy / "processor_config.json", image_end_tag="<image_end>", image_start_tag=None)
    prompt = read_published(copy, vae=VAE).config.prompt
    assert (prompt.image_start, prompt.image_end) == ("<begin_of_image>", "<image_end>")
    assert (prompt.user, prompt.assistant) == ("User", "Assistant")
    change(copy / "processor_config.json", image_gen_tag=7)
    with pytest.raises(ConfigError, match="image_gen_tag must be text"):
        read_published(copy, vae=VAE)


def test_text_that_spells_a_tag_stays_text(flow: Any) -> None:
    ids = flow.pathway.prompt_ids("a <image_beg> fox")
    assert ids.count(flow.prompts.special.image_start) == 1  # the last


# Quantization


def test_quantized_is_near_float(flow_folder: Path, flow: Any) -> None:
    (exact,) = flow.generate_images(PROMPT, steps=4, latents=noise()[:1])
    errors = {}
    for bits in (8, 4):
        janus = mlx_janus.load(flow_folder, bits=bits)
        plan = janus.config.quantization
        assert plan is not None
        parts = {layer.path.partition(".")[0] for layer in plan.layers}
        assert parts == {"language_model"}  # the vision adaptor is 48 wide here
        assert plan.kept_float is not None
        assert "aligner.linear" in plan.kept_float
        (image,) = janus.generate_images(PROMPT, steps=4, latents=noise()[:1])
        errors[bits] = rms_error(image.latents, exact.latents)
    assert 0 < errors[8] < 0.03 < errors[4] < 0.4


def test_a_quantized_folder_is_that_of_loading(flow_folder: Path, tmp_path: Path) -> None:
    stored = mlx_janus.load(convert_flow(tmp_path / "four", bits=4, dtype="float32"))
    loaded = mlx_janus.load(flow_folder, bits=4)
    assert stored.config.quantization == loaded.config.quantization
    images = [
        janus.generate_images(PROMPT, steps=2, latents=noise()[:1])[0] for janus in (stored, loaded)
    ]
    assert rms_error(images[0].latents, images[1].latents) == 0


def test_a_checkup_of_the_source_finds_nothing(copy: Path) -> None:
    assert find_faults(copy, headers=True) == []
