"""Reading the config of a published model, in DeepSeek's layout or transformers'.

DeepSeek's files name some sizes by variant (``siglip_large_patch16_384``, ``VQ-16``) and omit the
defaults of transformers' LlamaConfig; explicit sizes override the variant's. JanusFlow and
DeepSeek-VL have the same ``model_type`` as Janus. Only Janus has ``gen_vision_config``,
``gen_aligner_config`` and ``gen_head_config``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..config import (
    DTYPES,
    Dtype,
    GenHeadConfig,
    ImageConfig,
    JanusConfig,
    LlamaConfig,
    MLPConfig,
    PromptConfig,
    SiglipConfig,
    VQConfig,
    VQGenerationConfig,
    read_model_json,
)
from ..errors import ConfigError, UnsupportedModelError

Layout = Literal["deepseek", "transformers"]

WORKING_MODELS = (
    "deepseek-ai/Janus-1.3B, deepseek-ai/Janus-Pro-1B and deepseek-ai/Janus-Pro-7B work"
)

# Variants: SIGLIP_MODEL_CFG in janus/models/siglip_vit.py and VQ_16 in janus/models/vq_model.py.
SIGLIP_VARIANTS: dict[str, dict[str, Any]] = {
    "siglip_large_patch16_384": {
        "image_size": 384,
        "patch_size": 16,
        "width": 1024,
        "layers": 24,
        "heads": 16,
        "mlp_ratio": 4,
    },
}
VQ_VARIANTS: dict[str, dict[str, Any]] = {
    "VQ-16": {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 256},
}
# Defaults of transformers' LlamaConfig; Janus-Pro-7B omits the sizes that equal them.
LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


def read_published_config(folder: Path) -> tuple[JanusConfig, Layout]:
    """Read the config of a PyTorch model folder, and detect its layout.

    Raises:
        ConfigError: a needed file is missing (``config.json``, and ``tokenizer.json`` in DeepSeek's
            layout), a file is malformed, or a value is impossible.
        UnsupportedModelError: the model is of another family, or has a part that is not supported.
    """
    path = folder / "config.json"
    config, layout = read_published_sizes(path)
    try:
        config = replace(
            config,
            image=_image(folder, config.image),
            prompt=_prompt(folder, layout, config.prompt),
        )
        config = replace(config, generation=replace(config.generation, **_guidance(folder)))
    except ConfigError as error:
        # Errors of whole files name their path already; errors of single values do not.
        raise error if str(folder) in str(error) else ConfigError(f"{folder}: {error}") from None
    return config, layout


def read_published_sizes(path: Path) -> tuple[JanusConfig, Layout]:
    """Read only ``config.json``; prompts and preprocessing keep their defaults.

    Raises:
        ConfigError: the file is missing or malformed, or a size is impossible.
        UnsupportedModelError: the model is of another family, or has a part that is not supported.
    """
    data = read_model_json(path)
    try:
        layout = detect_layout(data)
        config = _from_deepseek(data) if layout == "deepseek" else _from_transformers(data)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path} {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config, layout


def detect_layout(data: Mapping[str, Any]) -> Layout:
    """Detect the layout of a parsed ``config.json``.

    Raises:
        UnsupportedModelError: the model is of another family. As everywhere below, the message
            lacks its subject, the file: ``read_published_sizes`` puts the path first.
    """
    model_type = data.get("model_type")
    if model_type == "janus":
        return "transformers"
    if model_type != "multi_modality":
        architectures = data.get("architectures")
        named = (
            architectures[0] if isinstance(architectures, list) and architectures else model_type
        )
        family = str(named)[:60]
        raise UnsupportedModelError(f"is of a {family} model, not of Janus: {WORKING_MODELS}")
    if any(key.startswith(("vision_gen_", "vision_und_")) for key in data):
        raise UnsupportedModelError(
            f"is of JanusFlow, which draws by rectified flow: {WORKING_MODELS}"
        )
    if data.keys().isdisjoint(("gen_vision_config", "gen_aligner_config", "gen_head_config")):
        raise UnsupportedModelError(f"is of DeepSeek-VL, which cannot draw: {WORKING_MODELS}")
    return "deepseek"


def _object(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return an entry, or raise ConfigError if it is not a JSON object."""
    value = data.get(key)
    if not isinstance(value, dict):
        raise ConfigError(f"{key!r} must be a JSON object, got {type(value).__name__}")
    return value


def _params(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return _object(_object(data, key), "params")


def _pick(data: Mapping[str, Any], *keys: str) -> Any:
    """Return the value of the first key that is present and not null; else raise ConfigError."""
    for key in keys:
        if data.get(key) is not None:
            return data[key]
    raise ConfigError(f"{' or '.join(map(repr, keys))} is missing")


def _mlp_width(width: Any, ratio: Any) -> int:
    """Return the width of an encoder's MLP.

    Raises:
        ConfigError: a value is not a number (a bool is none), or the product is not finite.
    """
    numbers = type(width) in (int, float) and type(ratio) in (int, float)
    if not numbers or not math.isfinite(width * ratio):
        raise ConfigError(
            f"width and mlp_ratio must be numbers, got {str(width)[:40]!r} and {str(ratio)[:40]!r}"
        )
    return int(width * ratio)


def _tuple(value: Any) -> Any:
    """Turn a JSON list into a tuple, as a frozen config needs; keep other values."""
    return tuple(value) if isinstance(value, list) else value


def _from_deepseek(data: Mapping[str, Any]) -> JanusConfig:
    vision = _deepseek_vision(data)
    language = _language(_object(data, "language_config"), LLAMA_DEFAULTS)
    head = _params(data, "gen_head_config")
    return JanusConfig(
        understanding=vision,
        aligner=_deepseek_projector(data, "aligner_config"),
        language=language,
        generation=VQGenerationConfig(
            kind="vq",
            image_size=vision.image_size,
            codec=_deepseek_codec(data),
            aligner=_deepseek_projector(data, "gen_aligner_config"),
            head=GenHeadConfig(
                kind="vision_head",
                input_dim=_pick(head, "n_embed"),
                hidden_dim=_pick(head, "image_token_embed"),
                output_dim=_pick(head, "image_token_size"),
            ),
        ),
        image=ImageConfig(image_size=vision.image_size),
        dtype=_dtype(data),
    )


def _deepseek_vision(data: Mapping[str, Any]) -> SiglipConfig:
    params = _params(data, "vision_config")
    name = params.get("model_name", "siglip_large_patch16_384")
    needed = ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio")
    sizes = _variant_sizes(SIGLIP_VARIANTS, name, params, needed)
    if sizes is None:
        raise UnsupportedModelError(
            f"names an unknown vision encoder {str(name)[:60]!r}: {WORKING_MODELS}"
        )
    if params.get("select_layer", -1) != -1 or params.get("select_feature", "same") != "same":
        raise UnsupportedModelError(
            "takes features from inside the vision encoder; only its last layer is supported"
        )
    ratio = sizes.pop("mlp_ratio")  # the config has the MLP's width instead
    return SiglipConfig(kind="siglip", **sizes, mlp_width=_mlp_width(sizes["width"], ratio))


def _variant_sizes(
    variants: Mapping[str, Mapping[str, Any]],
    name: Any,
    params: Mapping[str, Any],
    needed: Collection[str],
) -> dict[str, Any] | None:
    """Return the needed sizes: explicit ones, else the variant's.

    Returns:
        None if the variant is unknown and a size is not explicit.
    """
    known = variants.get(name) if isinstance(name, str) else None
    given = {key: params[key] for key in needed if key in params}
    if known is None and len(given) < len(needed):
        return None
    return {**(known or {}), **given}


def _deepseek_codec(data: Mapping[str, Any]) -> VQConfig:
    section = _object(data, "gen_vision_config")
    params = _object(section, "params")
    name = section.get("cls", "VQ-16")
    needed = ("ch", "ch_mult", "num_res_blocks", "z_channels")
    sizes = _variant_sizes(VQ_VARIANTS, name, params, needed)
    if sizes is None:
        raise UnsupportedModelError(
            f"names an unknown image codec {str(name)[:60]!r}: {WORKING_MODELS}"
        )
    sizes["ch_mult"] = _tuple(sizes["ch_mult"])
    return VQConfig(
        kind="vq",
        codebook_size=_pick(params, "codebook_size", "image_token_size"),
        codebook_dim=_pick(params, "n_embed"),
        **sizes,
    )


def _deepseek_projector(data: Mapping[str, Any], key: str) -> MLPConfig:
    params = _params(data, key)
    kind = params.get("projector_type", "mlp_gelu")
    if kind != "mlp_gelu":
        raise UnsupportedModelError(
            f"has a {str(kind)[:40]!r} projector in {key}; only 'mlp_gelu' is supported"
        )
    return MLPConfig(
        kind="mlp_gelu",
        input_dim=_pick(params, "input_dim"),
        output_dim=_pick(params, "n_embed"),
        depth=params.get("depth", 1),
    )


def _language(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> LlamaConfig:
    """Read the language model's config; ``defaults`` has the sizes that the layout may omit.

    Raises:
        ConfigError: a size is missing or impossible.
        UnsupportedModelError: the model is not a Llama, has biases, or scales rotary embeddings.
    """
    if data.get("model_type", "llama") != "llama":
        raise UnsupportedModelError(
            f"has a {str(data['model_type'])[:40]!r} language model; only Llama is supported"
        )
    if data.get("attention_bias") or data.get("mlp_bias"):
        raise UnsupportedModelError("has biases in its language model; Janus's Llama has none")
    sizes: dict[str, Any] = {}
    for key in LLAMA_DEFAULTS:  # only its keys are used; default values are in ``defaults``
        value = data.get(key)
        sizes[key] = defaults.get(key) if value is None else value
    if missing := [key for key, value in sizes.items() if value is None]:
        raise ConfigError(f"the language model's {missing[0]!r} is missing")
    heads = sizes["num_attention_heads"]
    head_dim = data.get("head_dim")
    if head_dim is None:
        head_dim = _head_dim(sizes["hidden_size"], heads)
    return LlamaConfig(
        kind="llama",
        **sizes,
        num_key_value_heads=data.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=_rope_theta(data),
    )


def _head_dim(hidden_size: Any, heads: Any) -> int:
    """Return the width of an attention head, from unchecked JSON values.

    Raises:
        ConfigError: ``hidden_size`` is not a multiple of ``heads``.
    """
    whole_numbers = type(heads) is int and type(hidden_size) is int
    if not whole_numbers or heads < 1 or hidden_size % heads:
        raise ConfigError(f"hidden_size {hidden_size!r} must be a multiple of {heads!r} heads")
    return int(hidden_size // heads)


def _rope_theta(data: Mapping[str, Any]) -> Any:
    """Return the base of rotary embeddings, as spelled by transformers 4 or 5.

    Raises:
        ConfigError: the entry is not a JSON object.
        UnsupportedModelError: the embeddings are scaled.
    """
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters must be a JSON object, got {type(rope).__name__}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UnsupportedModelError(
            f"scales its rotary embeddings ({str(kind)[:40]!r}); only plain ones are supported"
        )
    return rope.get("rope_theta", data.get("rope_theta", 10000.0))


def _dtype(data: Mapping[str, Any]) -> Dtype:
    """Return the type of the weights: the model's, else its language model's, else bfloat16.

    Raises:
        ConfigError: the type is unknown, or ``language_config`` is needed but missing.
    """
    value = (
        data.get("dtype")
        or data.get("torch_dtype")
        or _object(data, "language_config").get("torch_dtype")
    )
    value = str(value or "bfloat16").removeprefix("torch.")
    if value not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {value[:40]!r}")
    return value  # type: ignore[return-value]


def _from_transformers(data: Mapping[str, Any]) -> JanusConfig:
    vision_data = _object(data, "vision_config")
    vision = _transformers_vision(vision_data)
    codec = _object(data, "vq_config")
    # Of the keys of ``LLAMA_DEFAULTS``, this layout may omit only the epsilon.
    language = _language(_object(data, "text_config"), {"rms_norm_eps": 1e-6})
    return JanusConfig(
        understanding=vision,
        aligner=MLPConfig(
            kind="mlp_gelu",
            input_dim=vision.width,
            output_dim=vision_data.get("projection_dim", language.hidden_size),
            depth=vision_data.get("depth", 2),
        ),
        language=language,
        generation=_transformers_generation(codec, vision.image_size, language.hidden_size),
        image=ImageConfig(image_size=vision.image_size),
        dtype=_dtype({"language_config": {}, **data}),  # this layout has no language_config
    )


def _transformers_generation(
    codec: Mapping[str, Any], image_size: int, hidden_size: int
) -> VQGenerationConfig:
    if codec.get("double_latent"):
        raise UnsupportedModelError(
            "has an image codec with double latents; Janus's has single ones"
        )
    codebook_size = _pick(codec, "num_embeddings")
    codebook_dim = _pick(codec, "embed_dim")
    width = codec.get("projection_dim", hidden_size)
    return VQGenerationConfig(
        kind="vq",
        image_size=image_size,
        codec=VQConfig(
            kind="vq",
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            ch=_pick(codec, "base_channels"),
            ch_mult=_tuple(_pick(codec, "channel_multiplier")),
            num_res_blocks=_pick(codec, "num_res_blocks"),
            z_channels=_pick(codec, "latent_channels"),
        ),
        aligner=MLPConfig(
            kind="mlp_gelu",
            input_dim=codebook_dim,
            output_dim=width,
            depth=codec.get("num_hidden_layers", 2),
        ),
        head=GenHeadConfig(
            kind="vision_head",
            input_dim=width,
            hidden_dim=codec.get("image_token_embed_dim", hidden_size),
            output_dim=codebook_size,
        ),
    )


def _transformers_vision(data: Mapping[str, Any]) -> SiglipConfig:
    if data.get("use_qk_norm"):
        raise UnsupportedModelError("normalises q and k in its vision encoder; Janus's does not")
    if data.get("hidden_act", "gelu") != "gelu":
        raise UnsupportedModelError(
            f"has {str(data['hidden_act'])[:40]!r} in its vision encoder; Janus has 'gelu'"
        )
    width = _pick(data, "hidden_size")
    return SiglipConfig(
        kind="siglip",
        image_size=_pick(data, "image_size"),
        patch_size=_pick(data, "patch_size"),
        width=width,
        layers=_pick(data, "num_hidden_layers"),
        heads=_pick(data, "num_attention_heads"),
        mlp_width=_mlp_width(width, data.get("mlp_ratio", 4.0)),
        layer_norm_eps=data.get("layer_norm_eps", 1e-6),
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_model_json(path) if path.exists() else {}


def _image(folder: Path, image: ImageConfig) -> ImageConfig:
    """Read the preprocessing, but not ``do_normalize``: old mirrors of Janus-1.3B have it wrong.

    Raises:
        ConfigError: a file is malformed, or a value is impossible.
    """
    data = _optional_json(folder / "preprocessor_config.json")
    if not data:
        data = _optional_json(folder / "processor_config.json").get("image_processor") or {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{folder / 'processor_config.json'}: image_processor must be a JSON object"
        )
    given = {
        "min_size": data.get("min_size"),
        "background": _tuple(data.get("background_color")),
        "mean": _tuple(data.get("image_mean")),
        "std": _tuple(data.get("image_std")),
    }
    return replace(image, **{key: value for key, value in given.items() if value is not None})


def _prompt(folder: Path, layout: Layout, prompt: PromptConfig) -> PromptConfig:
    """Replace the default control tokens and roles by those of a folder."""
    tokenizer_config = _optional_json(folder / "tokenizer_config.json")
    spelled = {key: _spelling(tokenizer_config.get(f"{key}_token")) for key in ("bos", "eos")}
    prompt = replace(prompt, **{key: value for key, value in spelled.items() if value})
    if layout == "deepseek":
        tag = _optional_json(folder / "processor_config.json").get("image_tag")
        prompt = replace(prompt, image=tag) if isinstance(tag, str) and tag else prompt
        # Janus-1.3B has plain roles. It is recognised by its tokenizer, which lacks the image
        # placeholder. Its sft_format is no sign, since some mirrors have a wrong one.
        plain_roles = prompt.image not in _added_tokens(folder)
    else:
        # Here a template without the default role "<|User|>" is the sign of plain roles.
        template = _chat_template(folder, tokenizer_config)
        plain_roles = bool(template) and prompt.user not in template
    return replace(prompt, user="User", assistant="Assistant") if plain_roles else prompt


def _spelling(token: Any) -> str | None:
    """Return the text of a token, stored directly or as ``content`` of an object, else None."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _added_tokens(folder: Path) -> set[str]:
    """Return the spellings of the added tokens and of the vocabulary."""
    data = read_model_json(folder / "tokenizer.json")
    tokens: set[str] = set()
    added = data.get("added_tokens")
    if isinstance(added, list):
        tokens |= {str(entry.get("content")) for entry in added if isinstance(entry, dict)}
    model = data.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        tokens |= set(vocabulary)
    return tokens


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str:
    """Return the chat template from the first of three places that has one; "" if none has.

    Raises:
        ConfigError: a file cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): download it again") from None
    in_json = _optional_json(folder / "chat_template.json").get("chat_template")
    template = in_json or tokenizer_config.get("chat_template") or ""
    return template if isinstance(template, str) else str(template)


def _guidance(folder: Path) -> dict[str, Any]:
    """Return a folder's default guidance as the field ``cfg_weight``; empty if it has none."""
    scale = _optional_json(folder / "generation_config.json").get("guidance_scale")
    return {} if scale is None else {"cfg_weight": scale}
