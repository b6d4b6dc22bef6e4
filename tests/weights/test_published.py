"""Every published form of config is read; other models, and no models, are refused by name."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_janus.config import JanusConfig, SiglipConfig
from mlx_janus.errors import ConfigError, JanusError, UnsupportedModelError
from mlx_janus.sections import Section, _from_json
from mlx_janus.weights.published import (
    read_published,
    read_published_config,
    read_published_sizes,
)
from tests.support.configs import published_1b
from tests.support.golden import FIXTURES

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Make a model folder with a given config, the rest of its files from a fixture."""

    def make(config: dict[str, Any] | str, like: str = "deepseek-pro-bin", **files: Any) -> Path:
        for file in (FIXTURES / like).glob("*.json"):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, tmp_path)
        (tmp_path / "config.json").write_text(
            config if isinstance(config, str) else json.dumps(config)
        )
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return make


def fixture_config(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((FIXTURES / name / "config.json").read_text())
    return data


def test_janus_pro_7b_sizes_that_are_not_written(model: Callable[..., Path]) -> None:
    config, layout = read_published_config(model(published_1b()))
    language = config.language
    assert layout == "deepseek"
    assert (language.hidden_size, language.intermediate_size, language.num_hidden_layers) == (
        4096,
        11008,
        30,
    )
    assert (language.num_attention_heads, language.num_key_value_heads, language.head_dim) == (
        32,
        32,
        128,
    )
    assert (language.rms_norm_eps, language.rope_theta, language.vocab_size) == (
        1e-6,
        10000.0,
        102400,
    )
    assert (config.generation.grid, config.generation.tokens, config.understanding.tokens) == (
        24,
        576,
        576,
    )


def test_named_variants(model: Callable[..., Path]) -> None:
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    config, _ = read_published_config(
        model(published_1b({**sizes, "_attn_implementation": "flash_attention_2"}))
    )
    assert config.understanding == SiglipConfig("siglip", 384, 16, 1024, 24, 16, 4096, 1e-6)
    codec = config.generation.codec
    assert (codec.ch, codec.ch_mult, codec.num_res_blocks, codec.z_channels) == (
        128,
        (1, 1, 2, 2, 4),
        2,
        256,
    )
    assert (codec.codebook_size, codec.codebook_dim, codec.downsampling) == (16384, 8, 16)
    assert (config.generation.cfg_weight, config.generation.temperature) == (5.0, 1.0)


def test_sizes_written_out_win_over_the_variant() -> None:
    config, _ = read_published_config(FIXTURES / "deepseek-pro-bin")
    assert (
        config.understanding.width,
        config.understanding.layers,
        config.generation.codec.ch,
    ) == (32, 2, 32)
    assert config.generation.codec.ch_mult == (1, 1, 1, 1, 2)


def test_both_layouts_of_the_same_model_agree() -> None:
    ours, _ = read_published_config(FIXTURES / "deepseek-pro-bin")
    theirs, layout = read_published_config(FIXTURES / "transformers")
    assert layout == "transformers"
    assert theirs == ours


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.update(rope_theta=500000.0, rope_parameters=None),
        lambda text: (text.pop("rope_parameters"), text.update(rope_theta=500000.0)),
        lambda text: text["rope_parameters"].update(rope_theta=500000.0),
    ],
)
def test_rope_theta_old_and_new(model: Callable[..., Path], edit: Edit) -> None:
    data = fixture_config("transformers")
    edit(data["text_config"])
    assert (
        read_published_config(model(data, like="transformers"))[0].language.rope_theta == 500000.0
    )


def test_the_roles_of_the_reference_models() -> None:
    assert read_published_config(FIXTURES / "deepseek-janus-safetensors")[0].prompt.user == "User"
    assert read_published_config(FIXTURES / "deepseek-pro-bin")[0].prompt.user == "<|User|>"


@pytest.mark.parametrize(
    ("template", "user"),
    [("{{'<|User|>: '}}", "<|User|>"), ("{{role.capitalize()}}: ", "User"), (None, "<|User|>")],
)
def test_roles_of_transformers_layout_come_from_the_template(
    model: Callable[..., Path], template: str | None, user: str
) -> None:
    folder = model(fixture_config("transformers"), like="transformers")
    if template:
        (folder / "chat_template.jinja").write_text(template)
    assert read_published_config(folder)[0].prompt.user == user


def test_preprocessing_of_old_mirrors(model: Callable[..., Path]) -> None:
    """``do_normalize: false`` of old Janus-1.3B mirrors is wrong and ignored."""
    folder = model(
        fixture_config("deepseek-pro-bin"),
        preprocessor_config={
            "do_normalize": False,
            "image_size": 64,
            "min_size": 20,
            "background_color": [1, 2, 3],
        },
    )
    image = read_published_config(folder)[0].image
    assert (image.mean, image.std, image.min_size, image.background) == (
        (0.5,) * 3,
        (0.5,) * 3,
        20,
        (1, 2, 3),
    )


@pytest.mark.parametrize(("scale", "weight"), [(3.5, 3.5), (1, 1), (0.5, 1), (0, 1)])
def test_guidance_of_a_transformers_folder(
    model: Callable[..., Path], scale: float, weight: float
) -> None:
    """transformers leaves out guidance at a scale of 1 or less."""
    folder = model(
        fixture_config("transformers"),
        like="transformers",
        generation_config={"guidance_scale": scale},
    )
    assert read_published_config(folder)[0].generation.cfg_weight == weight


FOREIGN = [
    (
        {"model_type": "multi_modality", "vision_gen_enc_config": {}, "vision_gen_dec_config": {}},
        "JanusFlow",
    ),
    (
        {
            "model_type": "multi_modality",
            "vision_config": {},
            "aligner_config": {},
            "language_config": {},
        },
        "DeepSeek-VL",
    ),
    ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    ({"model_type": "deepseek_vl_v2"}, "deepseek_vl_v2"),
    ({}, "None"),
]


@pytest.mark.parametrize(("data", "name"), FOREIGN)
def test_other_families_are_refused_by_name(
    model: Callable[..., Path], data: dict[str, Any], name: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=name) as caught:
        read_published_config(model(data))
    assert "config.json" in str(caught.value)
    assert "Janus-Pro-1B" in str(caught.value)  # what would work
    assert "\n" not in str(caught.value)


def _set(*path: str, to: Any) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return edit


HOSTILE = [
    _set("vision_config", to=None),
    _set("vision_config", "params", to=[1]),
    _set("vision_config", "params", "image_size", to=-384),
    _set("vision_config", "params", "image_size", to=1 << 40),
    _set("vision_config", "params", "image_size", to="64"),
    _set("vision_config", "params", "width", to=None),
    _set("vision_config", "params", "heads", to=0),
    _set("vision_config", "params", "heads", to=5),
    _set("vision_config", "params", "mlp_ratio", to=1e308),
    _set("vision_config", "params", "select_layer", to=-2),
    _set("gen_vision_config", "cls", to="VQ-8"),
    _set("gen_vision_config", "params", "ch_mult", to=[]),
    _set("gen_vision_config", "params", "ch_mult", to=[1] * 40),
    _set("gen_vision_config", "params", "ch_mult", to="11"),
    _set("gen_vision_config", "params", "ch", to=33),
    _set("gen_vision_config", "params", "num_res_blocks", to=10**9),
    _set("gen_head_config", "params", "n_embed", to=31),
    _set("gen_aligner_config", "params", "depth", to=0),
    _set("gen_aligner_config", "params", "projector_type", to="linear"),
    _set("language_config", to=7),
    _set("language_config", "hidden_size", to=33),
    _set("language_config", "num_attention_heads", to=0),
    _set("language_config", "num_hidden_layers", to=10**6),
    _set("language_config", "num_key_value_heads", to=3),
    _set("language_config", "vocab_size", to=-1),
    _set("language_config", "rope_scaling", to={"type": "linear", "factor": 2}),
    _set("language_config", "rope_scaling", to="linear"),
    _set("language_config", "attention_bias", to=True),
    _set("language_config", "model_type", to="mixtral"),
    _set("language_config", "rms_norm_eps", to=float("nan")),
    _set("torch_dtype", to="int4"),
]


@pytest.mark.parametrize("edit", HOSTILE)
def test_configs_that_no_model_can_have(model: Callable[..., Path], edit: Edit) -> None:
    data = fixture_config("deepseek-pro-bin")
    data["vision_config"]["params"].setdefault("mlp_ratio", 4)
    edit(data)
    if data["vision_config"] and isinstance(data["vision_config"].get("params"), dict):
        params = data["vision_config"]["params"]
        if params.get("width", 1) is None:
            params.pop("model_name")
    if isinstance(data["gen_vision_config"], dict) and data["gen_vision_config"]["cls"] == "VQ-8":
        data["gen_vision_config"]["params"].pop("ch")
    with pytest.raises((ConfigError, UnsupportedModelError)) as caught:
        read_published_config(model(data))
    assert str(model(data)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '"x"', "\x00\xff", "[" * 100_000, '{"model_type": NaN}']
)
def test_config_that_is_no_json_object(model: Callable[..., Path], text: str) -> None:
    with pytest.raises(JanusError, match=r"config\.json") as caught:
        read_published_config(model(text))
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(model: Callable[..., Path]) -> None:
    folder = model(fixture_config("deepseek-pro-bin"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        read_published_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        read_published_config(folder)


REFUSED = [
    ("transformers", ("text_config", "hidden_act"), "gelu"),
    ("transformers", ("text_config", "partial_rotary_factor"), 0.5),
    ("transformers", ("text_config", "rope_parameters", "partial_rotary_factor"), 0.5),
    ("transformers", ("text_config", "quantization_config"), {"quant_method": "gptq"}),
    ("transformers", ("vision_config", "hidden_act"), "gelu_pytorch_tanh"),
    ("transformers", ("vision_config", "attention_bias"), False),
    ("transformers", ("vision_config", "num_channels"), 4),
    ("transformers", ("vision_config", "num_image_tokens"), 9),
    ("transformers", ("vision_config", "use_qk_norm"), True),
    ("transformers", ("vq_config", "hidden_act"), "relu"),
    ("transformers", ("vq_config", "in_channels"), 1),
    ("transformers", ("vq_config", "out_channels"), 4),
    ("transformers", ("vq_config", "double_latent"), True),
    ("transformers", ("vq_config", "channel_multiplier"), [1, 1, 2]),
    ("deepseek-pro-bin", ("quantization_config",), {"quant_method": "bitsandbytes"}),
    ("deepseek-pro-bin", ("quantization",), {"group_size": 64, "bits": 4}),
    ("deepseek-pro-bin", ("language_config", "hidden_act"), "gelu"),
    ("deepseek-pro-bin", ("language_config", "mlp_bias"), True),
    ("deepseek-pro-bin", ("vision_config", "cls"), "HybridVisionTower"),
    ("deepseek-pro-bin", ("aligner_config", "cls"), "TokenPooling"),
    ("deepseek-pro-bin", ("gen_aligner_config", "cls"), ["x"]),
    ("deepseek-pro-bin", ("gen_head_config", "cls"), "linear"),
    ("deepseek-pro-bin", ("vision_config", "params", "ignore_head"), False),
    ("deepseek-pro-bin", ("vision_config", "params", "select_layer"), -2),
    ("deepseek-pro-bin", ("vision_config", "params", "select_layer"), 1),
    ("deepseek-pro-bin", ("vision_config", "params", "select_layer"), True),
    ("deepseek-pro-bin", ("vision_config", "params", "select_layer"), None),
]


@pytest.mark.parametrize(("layout", "path", "value"), REFUSED)
def test_options_that_change_the_numbers_are_refused_by_name(
    model: Callable[..., Path], layout: str, path: tuple[str, ...], value: Any
) -> None:
    data = fixture_config(layout)
    _set(*path, to=value)(data)
    folder = model(data, like=layout)
    with pytest.raises(UnsupportedModelError) as caught:
        read_published_config(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'config.json'} ")
    assert "\n" not in message
    named = {"mlp_bias", "double_latent", "use_qk_norm", "cls", "channel_multiplier"}
    assert path[-1] in message or path[-1] in named
    # Before a download there is only this file.
    with pytest.raises(UnsupportedModelError):
        read_published_sizes(folder / "config.json")


HONOURED = [
    ("transformers", ("text_config", "hidden_act"), "swish"),
    ("transformers", ("text_config", "partial_rotary_factor"), 1.0),
    ("transformers", ("vision_config", "hidden_act"), "gelu_python"),
    ("transformers", ("vq_config", "hidden_act"), None),
    ("transformers", ("vq_config", "dropout"), 0.3),
    ("transformers", ("vq_config", "num_patches"), 99),
    ("transformers", ("quantization_config",), None),
    ("deepseek-pro-bin", ("language_config", "pretraining_tp"), 2),
    ("deepseek-pro-bin", ("language_config", "eos_token_id"), [1, 2]),
    ("deepseek-pro-bin", ("vision_config", "params", "select_layer"), 0),
    ("deepseek-pro-bin", ("vision_config", "params", "select_layer"), 2),
    ("deepseek-pro-bin", ("vision_config", "params", "select_layer"), 24),
    ("deepseek-pro-bin", ("vision_config", "params", "select_feature"), "patch"),
    ("deepseek-pro-bin", ("vision_config", "params", "select_feature"), "cls_patch"),
    ("deepseek-pro-bin", ("vision_config", "params", "select_layers"), [1, 2]),
    ("deepseek-pro-bin", ("vision_config", "params", "ckpt_path"), "x.pt"),
    ("deepseek-pro-bin", ("vision_config", "params", "pixel_mean"), [0.1, 0.2, 0.3]),
    ("deepseek-pro-bin", ("vision_config", "cls"), "CLIPVisionTower2"),
]


@pytest.mark.parametrize(("layout", "path", "value"), HONOURED)
def test_options_that_change_nothing_are_taken(
    model: Callable[..., Path], layout: str, path: tuple[str, ...], value: Any
) -> None:
    """In DeepSeek's code, 0 and the number of layers mean the last layer, as -1 does."""
    data = fixture_config(layout)
    _set(*path, to=value)(data)
    folder = model(data, like=layout)
    assert read_published_config(folder) == read_published_config(FIXTURES / layout)


def test_a_second_normalization_is_the_encoders(model: Callable[..., Path]) -> None:
    data = fixture_config("deepseek-pro-bin")
    params = data["vision_config"]["params"]
    params.update(pixel_mean=[0.1, -0.2, 0.3], pixel_std=[0.5, 0.7, 0.9])
    config, _ = read_published_config(model(data))
    encoder = config.understanding
    assert (encoder.pixel_mean, encoder.pixel_std) == ((0.1, -0.2, 0.3), (0.5, 0.7, 0.9))
    path = model(data) / "config.json"
    config.dump(path)
    assert JanusConfig.load(path) == config
    for wrong in ([0.1], "x", [0, 0, 0], [1, 1, "x"]):
        params.update(pixel_std=wrong)
        with pytest.raises(ConfigError, match=r"config\.json: understanding: pixel_std must be"):
            read_published_config(model(data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_value_anywhere_gives_a_config_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    layout = data.draw(st.sampled_from(["deepseek-pro-bin", "transformers"]))
    config = fixture_config(layout)
    section = data.draw(st.sampled_from([k for k, v in config.items() if isinstance(v, dict)]))
    target = config[section]["params"] if "params" in config[section] else config[section]
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(json_values)
    folder = tmp_path_factory.mktemp("any")
    for file in (FIXTURES / layout).glob("*.json"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(JanusError):
        read_published_config(folder)


SMALL_FILES = [
    (layout, name)
    for layout in ("deepseek-pro-bin", "transformers")
    for name in (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "processor_config.json",
        "preprocessor_config.json",
        "generation_config.json",
    )
]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_value_in_any_small_file_gives_a_config_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    layout, name = data.draw(st.sampled_from(SMALL_FILES))
    folder = tmp_path_factory.mktemp("any")
    for file in (FIXTURES / layout).glob("*.json"):
        shutil.copy(file, folder)
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    further = ["unk_token", "eos_token_id", "pad_token_id", "additional_special_tokens", "pad_tag"]
    content[data.draw(st.sampled_from([*sorted(content), *further]))] = data.draw(json_values)
    (folder / name).write_text(json.dumps(content))
    try:
        lines = read_published(folder).notes
    except JanusError as error:
        lines = (str(error),)
        named = str(folder) in lines[0]
    else:
        named = True
    assert named
    assert not any("\n" in line for line in lines)


def test_converted_config_round_trip(tmp_path: Path) -> None:
    config, _ = read_published_config(FIXTURES / "deepseek-janus-safetensors")
    config.dump(tmp_path / "config.json")
    assert JanusConfig.load(tmp_path / "config.json") == config


def _as_version_1(data: dict[str, Any]) -> None:
    """Rewrite a config as the first releases wrote it."""
    own = data.pop("generation")
    data["format_version"] = 1
    data["generation"] = own["codec"]
    data["gen_aligner"] = own["aligner"]
    data["gen_head"] = own["head"]
    data["drawing"] = {"cfg_weight": own["cfg_weight"], "temperature": own["temperature"]}


@pytest.mark.parametrize("layout", ["deepseek-pro-bin", "transformers"])
def test_version_1_is_read(tmp_path: Path, layout: str) -> None:
    """Its parts of the image pathway lie side by side, and ``drawing`` may be left out."""
    config, _ = read_published_config(FIXTURES / layout)
    path = tmp_path / "config.json"
    config.dump(path)
    data = json.loads(path.read_text())
    assert data["format_version"] == 2
    _as_version_1(data)
    path.write_text(json.dumps(data))
    assert JanusConfig.load(path) == config
    del data["drawing"]
    path.write_text(json.dumps(data))
    assert (JanusConfig.load(path).generation.cfg_weight, config.generation.cfg_weight) == (
        5.0,
        5.0,
    )


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda data: data.pop("gen_head"), "lacks 'gen_head'"),
        (lambda data: data.update(drawing=3), "drawing must hold"),
        (lambda data: data["drawing"].update(steps=30), "drawing must hold"),
        (lambda data: data.update(understanding=3), "understanding must be"),
        (lambda data: data["gen_aligner"].update(depth=0), "depth"),
        (lambda data: data.update(format_version=True), "format version True"),
    ],
)
def test_version_1_configs_that_are_off(tmp_path: Path, edit: Edit, word: str) -> None:
    config, _ = read_published_config(FIXTURES / "deepseek-pro-bin")
    path = tmp_path / "config.json"
    config.dump(path)
    data = json.loads(path.read_text())
    _as_version_1(data)
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(JanusError, match=word) as caught:
        JanusConfig.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (_set("format_version", to=99), "format version 99"),
        (_set("model_type", to="llama"), "no converted"),
        (_set("language", "kind", to="mamba"), "kind must be 'llama'"),
        (_set("language", "extra", to=1), "unknown entry 'extra'"),
        (_set("understanding", to=3), "understanding must be a JSON object"),
        (
            _set("quantization", to={"bits": 4, "group_size": 64, "layers": [1]}),
            "layers must be a JSON object",
        ),
        (_set("generation", "temperature", to=-1), "temperature"),
        (_set("generation", "kind", to="flow"), "generation: kind must be .*'vq', got 'flow'"),
        (_set("generation", "kind", to=[]), "generation: kind must be .*'vq'"),
        (_set("generation", "image_size", to=10**12), "generation: image_size must be"),
        (_set("generation", "image_size", to=30), "generation: image_size must be a multiple of"),
        (
            _set("generation", "head", "output_dim", to=5),
            "generation: head.output_dim must be the codebook size",
        ),
        (
            _set("generation", "aligner", "output_dim", to=5),
            "generation: aligner.output_dim must be the language",
        ),
        (_set("dtype", to="int8"), "dtype"),
    ],
)
def test_converted_configs_that_are_off(tmp_path: Path, edit: Edit, word: str) -> None:
    config, _ = read_published_config(FIXTURES / "deepseek-pro-bin")
    path = tmp_path / "config.json"
    config.dump(path)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(JanusError, match=word) as caught:
        JanusConfig.load(path)
    assert str(path) in str(caught.value)


@dataclass(frozen=True)
class OtherConfig(Section):
    """What a second encoder would bring."""

    title: ClassVar[str] = "understanding"
    kind: Literal["other"]
    side: int = 3


def test_another_encoder_is_another_member_of_the_union() -> None:
    """A section is chosen by its kind, so that a field can be one of several encoders."""
    both = SiglipConfig | OtherConfig
    assert _from_json({"kind": "other", "side": 5}, both) == OtherConfig("other", 5)
    siglip = read_published_config(FIXTURES / "transformers")[0].understanding
    assert _from_json(siglip.to_dict(), both) == siglip
