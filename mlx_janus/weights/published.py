"""Reading the config of a published model, in DeepSeek's layout or transformers'.

DeepSeek's files name some sizes by variant (``siglip_large_patch16_384``, ``VQ-16``) and omit the
defaults of transformers' LlamaConfig; explicit sizes override the variant's. JanusFlow and
DeepSeek-VL have the same ``model_type`` as Janus. Only Janus has ``gen_vision_config``,
``gen_aligner_config`` and ``gen_head_config``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import (
    DTYPES,
    Dtype,
    GenHeadConfig,
    ImageConfig,
    JanusConfig,
    LlamaConfig,
    MLPConfig,
    SiglipConfig,
    VQConfig,
    VQGenerationConfig,
    read_model_json,
)
from ..errors import ConfigError, UnsupportedModelError
from ..sections import shorten
from .published_images import read_preprocessing
from .published_keys import option_notes
from .published_prompt import GENERATION_FILE, RolesChoice, read_prompt
from .published_values import Layout, errors_about, json_or_empty, refuse_others, tuple_if_list

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
_EXACT_GELU = ("gelu", "gelu_python")
"""Names of the exact GELU in transformers."""
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


@dataclass(frozen=True)
class Published:
    """The facts of a published model's folder."""

    config: JanusConfig
    layout: Layout
    roles: RolesChoice
    added_tokens: tuple[str, ...]  # special tokens that the files name, in the order of their ids
    notes: tuple[str, ...]  # for the user: doubts, and options that are not followed


def read_published(folder: Path, roles: str | None = None) -> Published:
    """Read the config of a PyTorch model folder, and detect its layout.

    Args:
        folder: the model folder.
        roles: one of ``ROLES`` to use in place of the folder's, or None.

    Raises:
        ConfigError: ``config.json`` or ``tokenizer.json`` is missing, a file is malformed, or a
            value is impossible.
        UnsupportedModelError: the model is of another family, or has a part or an option that is
            not supported.
        OptionError: ``roles`` is not one of ``ROLES``.
    """
    config, layout = read_published_sizes(folder / "config.json")
    image, image_notes = read_preprocessing(folder, layout, config.image)
    prompt = read_prompt(folder, layout, config, roles)
    with errors_about(folder / GENERATION_FILE):
        generation = replace(config.generation, **_read_guidance(folder))
    option_data = read_model_json(folder / "config.json")
    return Published(
        config=replace(config, image=image, prompt=prompt.prompt, generation=generation),
        layout=layout,
        roles=prompt.roles,
        added_tokens=prompt.added_tokens,
        notes=(*prompt.notes, *image_notes, *option_notes(folder, layout, option_data)),
    )


def read_published_config(folder: Path) -> tuple[JanusConfig, Layout]:
    """Return only the config and the layout of a PyTorch model folder.

    Raises:
        ConfigError, UnsupportedModelError: as for ``read_published``.
    """
    published = read_published(folder)
    return published.config, published.layout


def read_published_sizes(path: Path) -> tuple[JanusConfig, Layout]:
    """Read a published model's ``config.json``, and detect its layout.

    Prompts, preprocessing and guidance keep their defaults, since other files describe them.

    Raises:
        ConfigError: the file is missing or malformed, or a size is impossible.
        UnsupportedModelError: the model is of another family, or has a part that is not supported.
    """
    data = read_model_json(path)
    with errors_about(path):
        layout = detect_layout(data)
        _refuse_quantized(data)
        config = _from_deepseek(data) if layout == "deepseek" else _from_transformers(data)
    return config, layout


def detect_layout(data: Mapping[str, Any]) -> Layout:
    """Detect the layout of a parsed ``config.json``.

    Raises:
        UnsupportedModelError: the model is of another family. The message begins with its verb;
            ``read_published_sizes`` puts the file's path before it.
    """
    model_type = data.get("model_type")
    if model_type == "janus":
        return "transformers"
    if model_type != "multi_modality":
        architectures = data.get("architectures")
        if not isinstance(architectures, list) or not architectures:
            architectures = [model_type]
        family = str(architectures[0])[:60]
        raise UnsupportedModelError(f"is of a {family} model, not of Janus: {WORKING_MODELS}")
    # JanusFlow and DeepSeek-VL have the same ``model_type`` as Janus. Their other entries differ.
    if any(key.startswith(("vision_gen_", "vision_und_")) for key in data):
        raise UnsupportedModelError(
            f"is of JanusFlow, which draws by rectified flow: {WORKING_MODELS}"
        )
    if data.keys().isdisjoint(("gen_vision_config", "gen_aligner_config", "gen_head_config")):
        raise UnsupportedModelError(f"is of DeepSeek-VL, which cannot draw: {WORKING_MODELS}")
    return "deepseek"


def _refuse_quantized(data: Mapping[str, Any]) -> None:
    """Refuse a config of weights that another program has quantized.

    mlx-lm and mlx-vlm write ``quantization``, transformers writes ``quantization_config``.

    Raises:
        UnsupportedModelError: the config, or its language model's section, has one of these keys.
    """
    for section in (data, data.get("language_config"), data.get("text_config")):
        for key in ("quantization", "quantization_config"):
            if isinstance(section, dict) and section.get(key):
                raise UnsupportedModelError(
                    f"has {key!r}: another program has quantized the weights, which are not read; "
                    "take the original model, such as deepseek-ai/Janus-Pro-1B, with bits=4 or "
                    "bits=8"
                )


def _json_object(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the value of a key that must hold a JSON object.

    Raises:
        ConfigError: the key is missing, or holds anything else.
    """
    value = data.get(key)
    if not isinstance(value, dict):
        raise ConfigError(f"{key!r} must be a JSON object, got {type(value).__name__}")
    return value


def _section_params(data: Mapping[str, Any], section: str, kind: str) -> Mapping[str, Any]:
    """Return the ``params`` of a section of DeepSeek's config.

    Args:
        data: the config.
        section: the section's name.
        kind: the class in DeepSeek's code, which the section names as ``cls``.

    Raises:
        ConfigError: the section or its ``params`` is not a JSON object.
        UnsupportedModelError: the section names another class.
    """
    part = _json_object(data, section)
    found = part.get("cls")
    if found and kind not in str(found):  # DeepSeek's code accepts any name with this part
        raise UnsupportedModelError(
            f"names {str(found)[:60]!r} as the class in {section}; only {kind!r} is supported"
        )
    return _json_object(part, "params")


def _required(data: Mapping[str, Any], *keys: str) -> Any:
    """Return the value of the first of these keys that is present and not null.

    Raises:
        ConfigError: all of them are missing or null.
    """
    for key in keys:
        if data.get(key) is not None:
            return data[key]
    raise ConfigError(f"{' or '.join(map(repr, keys))} is missing")


def _mlp_width(width: Any, ratio: Any) -> int:
    """Return the width of an encoder's MLP: ``ratio`` times the encoder's width.

    Raises:
        ConfigError: a value is not a number (a bool does not count), or the product is not finite.
    """
    are_numbers = type(width) in (int, float) and type(ratio) in (int, float)
    # An integer above the largest float would raise an OverflowError in a product with a float.
    too_large = are_numbers and max(abs(width), abs(ratio)) > sys.float_info.max
    if not are_numbers or too_large or not math.isfinite(width * ratio):
        raise ConfigError(
            f"width and mlp_ratio must be numbers, got {str(width)[:40]!r} and {str(ratio)[:40]!r}"
        )
    return int(width * ratio)


def _from_deepseek(data: Mapping[str, Any]) -> JanusConfig:
    """Read a ``config.json`` in DeepSeek's layout.

    Raises:
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: a part of the model is not supported.
    """
    vision = _deepseek_vision(data)
    language = _read_language(_json_object(data, "language_config"), LLAMA_DEFAULTS)
    head = _section_params(data, "gen_head_config", "vision_head")
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
                input_dim=_required(head, "n_embed"),  # the language model's width
                hidden_dim=_required(head, "image_token_embed"),
                output_dim=_required(head, "image_token_size"),
            ),
        ),
        image=ImageConfig(image_size=vision.image_size),
        dtype=_weight_dtype(data),
    )


def _deepseek_vision(data: Mapping[str, Any]) -> SiglipConfig:
    """Read the vision encoder's config in DeepSeek's layout.

    Raises:
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: the encoder is unknown, its features are not the last layer's, or it
            has a pooling head.
    """
    params = _section_params(data, "vision_config", "CLIPVisionTower")
    variant = params.get("model_name", "siglip_large_patch16_384")
    needed = ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio")
    sizes = _variant_sizes(SIGLIP_VARIANTS, variant, params, needed)
    if sizes is None:
        raise UnsupportedModelError(
            f"names an unknown vision encoder {str(variant)[:60]!r}: {WORKING_MODELS}"
        )
    _refuse_inner_layers(params, sizes["layers"])
    refuse_others(params, "ignore_head", (True,), "vision encoder")
    ratio = sizes.pop("mlp_ratio")  # ``SiglipConfig`` has the MLP's width instead
    normalization: dict[str, Any] = {}
    for key in ("pixel_mean", "pixel_std"):
        normalization[key] = tuple_if_list(params.get(key))
    if None in normalization.values():  # DeepSeek's code ignores one without the other
        normalization = {}
    width = _mlp_width(sizes["width"], ratio)
    return SiglipConfig(kind="siglip", **sizes, mlp_width=width, **normalization)


def _refuse_inner_layers(params: Mapping[str, Any], layers: Any) -> None:
    """Refuse a vision encoder whose features are not those of its last layer.

    In DeepSeek's code, the features are the last layer's if ``select_layer`` is 0, -1, or at least
    the number of layers. Without ``select_layer``, the last layer is left out. ``select_feature``
    has no effect on SigLIP.

    Args:
        params: the vision encoder's options.
        layers: the number of its layers, an unchecked JSON value.

    Raises:
        UnsupportedModelError: the features are those of another layer.
    """
    chosen = params.get("select_layer")
    are_ints = type(chosen) is int and type(layers) is int
    if chosen in (-1, 0) or (are_ints and chosen >= layers):
        return
    given = "lacks select_layer, so that DeepSeek's code leaves out the last layer"
    if chosen is not None:
        given = f"has select_layer {shorten(chosen)}"
    raise UnsupportedModelError(
        f"takes features from inside the vision encoder ({given}); "
        "only its last layer, -1, is supported"
    )


def _variant_sizes(
    variants: Mapping[str, Mapping[str, Any]],
    variant: Any,
    params: Mapping[str, Any],
    needed: Collection[str],
) -> dict[str, Any] | None:
    """Return the sizes of a variant, overridden by those in ``params``.

    Args:
        variants: sizes of the known variants, by name.
        variant: the name in the config, an unchecked JSON value.
        params: the config's own entries.
        needed: names of the sizes.

    Returns:
        None if the variant is unknown and ``params`` lacks a size.
    """
    defaults = variants.get(variant) if isinstance(variant, str) else None
    overrides = {key: params[key] for key in needed if key in params}
    if defaults is None and len(overrides) < len(needed):
        return None
    return {**(defaults or {}), **overrides}


def _deepseek_codec(data: Mapping[str, Any]) -> VQConfig:
    """Read the image codec's config in DeepSeek's layout.

    Raises:
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: the codec is unknown.
    """
    section = _json_object(data, "gen_vision_config")
    params = _json_object(section, "params")
    variant = section.get("cls", "VQ-16")
    needed = ("ch", "ch_mult", "num_res_blocks", "z_channels")
    sizes = _variant_sizes(VQ_VARIANTS, variant, params, needed)
    if sizes is None:
        raise UnsupportedModelError(
            f"names an unknown image codec {str(variant)[:60]!r}: {WORKING_MODELS}"
        )
    sizes["ch_mult"] = tuple_if_list(sizes["ch_mult"])
    return VQConfig(
        kind="vq",
        codebook_size=_required(params, "codebook_size", "image_token_size"),
        codebook_dim=_required(params, "n_embed"),
        **sizes,
    )


def _deepseek_projector(data: Mapping[str, Any], section: str) -> MLPConfig:
    """Read a projector's config in DeepSeek's layout: ``aligner_config`` or ``gen_aligner_config``.

    Raises:
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: the projector is not an MLP with GELU.
    """
    params = _section_params(data, section, "MlpProjector")
    kind = params.get("projector_type", "mlp_gelu")
    if kind != "mlp_gelu":
        raise UnsupportedModelError(
            f"has a {str(kind)[:40]!r} projector in {section}; only 'mlp_gelu' is supported"
        )
    return MLPConfig(
        kind="mlp_gelu",
        input_dim=_required(params, "input_dim"),
        output_dim=_required(params, "n_embed"),  # the language model's width
        depth=params.get("depth", 1),
    )


def _read_language(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> LlamaConfig:
    """Read the language model's config.

    Args:
        data: the language model's section of ``config.json``.
        defaults: values of the sizes that the section may omit.

    Raises:
        ConfigError: a size is missing or impossible.
        UnsupportedModelError: the model is not a Llama, has biases or another activation, or scales
            rotary embeddings.
    """
    if data.get("model_type", "llama") != "llama":
        raise UnsupportedModelError(
            f"has a {str(data['model_type'])[:40]!r} language model; only Llama is supported"
        )
    if data.get("attention_bias") or data.get("mlp_bias"):
        raise UnsupportedModelError("has biases in its language model; Janus's Llama has none")
    refuse_others(data, "hidden_act", ("silu", "swish"), "language model")  # synonyms
    sizes: dict[str, Any] = {}
    for key in LLAMA_DEFAULTS:  # only for the names of the sizes; the values are in ``defaults``
        value = data.get(key)
        sizes[key] = defaults.get(key) if value is None else value
        if sizes[key] is None:
            raise ConfigError(f"the language model's {key!r} is missing")
    heads = sizes["num_attention_heads"]
    head_dim = data.get("head_dim")
    if head_dim is None:
        head_dim = _head_dim(sizes["hidden_size"], heads)
    return LlamaConfig(
        kind="llama",
        **sizes,
        num_key_value_heads=data.get("num_key_value_heads") or heads,  # equal by default
        head_dim=head_dim,
        rope_theta=_rope_theta(data),
    )


def _head_dim(hidden_size: Any, heads: Any) -> int:
    """Return the width of an attention head, from unchecked JSON values.

    Raises:
        ConfigError: ``heads`` is not a positive int, or ``hidden_size`` is not a multiple of it.
    """
    are_ints = type(heads) is int and type(hidden_size) is int
    if not are_ints or heads < 1 or hidden_size % heads:
        raise ConfigError(
            f"hidden_size {shorten(hidden_size)} must be a multiple of {shorten(heads)} heads"
        )
    return int(hidden_size // heads)


def _rope_theta(data: Mapping[str, Any]) -> Any:
    """Return the base of the rotary embeddings, an unchecked JSON value.

    Raises:
        ConfigError: ``rope_parameters`` or ``rope_scaling`` is not a JSON object.
        UnsupportedModelError: the embeddings are scaled, or rotate only a part of each head.
    """
    # transformers 5 writes ``rope_parameters``, transformers 4 ``rope_scaling``.
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters must be a JSON object, got {type(rope).__name__}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UnsupportedModelError(
            f"scales its rotary embeddings ({str(kind)[:40]!r}); only plain ones are supported"
        )
    for options in (rope, data):
        refuse_others(options, "partial_rotary_factor", (1,), "language model")
    return rope.get("rope_theta", data.get("rope_theta", 10000.0))  # 10000: transformers' default


def _weight_dtype(data: Mapping[str, Any]) -> Dtype:
    """Return the type of the weights: the entire model's, else the language model's, else bfloat16.

    Raises:
        ConfigError: the type is unknown, or the config names none for the entire model and has no
            ``language_config``.
    """
    stored = (
        data.get("dtype")
        or data.get("torch_dtype")
        or _json_object(data, "language_config").get("torch_dtype")
    )
    name = str(stored or "bfloat16").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {name[:40]!r}")
    return name  # type: ignore[return-value]


def _from_transformers(data: Mapping[str, Any]) -> JanusConfig:
    """Read a ``config.json`` in transformers' layout.

    Raises:
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: a part of the model is not supported.
    """
    vision_data = _json_object(data, "vision_config")
    vision = _transformers_vision(vision_data)
    codec = _json_object(data, "vq_config")
    # This layout may omit the epsilon, but no other size of the language model.
    language = _read_language(_json_object(data, "text_config"), {"rms_norm_eps": 1e-6})
    generation = _transformers_generation(codec, vision.image_size, language.hidden_size)
    if generation.tokens != vision.tokens:  # transformers has one number for both
        raise UnsupportedModelError(
            f"generates images of {generation.tokens} tokens and reads {vision.tokens}; "
            "only equal numbers are supported"
        )
    return JanusConfig(
        understanding=vision,
        aligner=MLPConfig(
            kind="mlp_gelu",
            input_dim=vision.width,
            output_dim=vision_data.get("projection_dim", language.hidden_size),
            depth=vision_data.get("depth", 2),
        ),
        language=language,
        generation=generation,
        image=ImageConfig(image_size=vision.image_size),
        # ``_weight_dtype`` expects a language_config, which this layout does not have.
        dtype=_weight_dtype({"language_config": {}, **data}),
    )


def _transformers_generation(
    codec: Mapping[str, Any], image_size: int, hidden_size: int
) -> VQGenerationConfig:
    """Read the config of image generation in transformers' layout.

    Args:
        codec: the section ``vq_config``.
        image_size: pixels per side of an image.
        hidden_size: the language model's width.

    Raises:
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: an option of the codec is not supported.
    """
    if codec.get("double_latent"):
        raise UnsupportedModelError(
            "has an image codec with double latents; Janus's has single ones"
        )
    refuse_others(codec, "hidden_act", _EXACT_GELU, "image adaptor and head")
    for key in ("in_channels", "out_channels"):
        refuse_others(codec, key, (3,), "image codec")
    codebook_size = _required(codec, "num_embeddings")
    codebook_dim = _required(codec, "embed_dim")
    embedding_width = codec.get("projection_dim", hidden_size)
    return VQGenerationConfig(
        kind="vq",
        image_size=image_size,
        codec=VQConfig(
            kind="vq",
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            ch=_required(codec, "base_channels"),
            ch_mult=tuple_if_list(_required(codec, "channel_multiplier")),
            num_res_blocks=_required(codec, "num_res_blocks"),
            z_channels=_required(codec, "latent_channels"),
        ),
        aligner=MLPConfig(
            kind="mlp_gelu",
            input_dim=codebook_dim,
            output_dim=embedding_width,
            depth=codec.get("num_hidden_layers", 2),
        ),
        head=GenHeadConfig(
            kind="vision_head",
            input_dim=codec.get("image_token_embed_dim", hidden_size),
            hidden_dim=embedding_width,
            output_dim=codebook_size,
        ),
    )


def _transformers_vision(data: Mapping[str, Any]) -> SiglipConfig:
    """Read the vision encoder's config in transformers' layout, the section ``vision_config``.

    Raises:
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: an option of the encoder is not supported.
    """
    if data.get("use_qk_norm"):
        raise UnsupportedModelError("normalises q and k in its vision encoder; Janus's does not")
    refuse_others(data, "hidden_act", _EXACT_GELU, "vision encoder")
    refuse_others(data, "attention_bias", (True,), "vision encoder")
    refuse_others(data, "num_channels", (3,), "vision encoder")
    width = _required(data, "hidden_size")
    config = SiglipConfig(
        kind="siglip",
        image_size=_required(data, "image_size"),
        patch_size=_required(data, "patch_size"),
        width=width,
        layers=_required(data, "num_hidden_layers"),
        heads=_required(data, "num_attention_heads"),
        mlp_width=_mlp_width(width, data.get("mlp_ratio", 4.0)),
        layer_norm_eps=data.get("layer_norm_eps", 1e-6),
    )
    refuse_others(data, "num_image_tokens", (config.tokens,), "vision encoder")
    return config


def _read_guidance(folder: Path) -> dict[str, Any]:
    """Return the folder's guidance scale as ``{"cfg_weight": scale}``, or {} if it has none.

    transformers leaves out guidance at a scale of 1 or less. Guidance with a scale of 1 has no
    effect, so a scale from 0 to 1 becomes 1. The config checks all other values.

    Raises:
        ConfigError: ``generation_config.json`` is malformed.
    """
    scale = json_or_empty(folder / GENERATION_FILE).get("guidance_scale")
    if scale is None:
        return {}
    return {"cfg_weight": 1.0 if type(scale) in (int, float) and 0 <= scale < 1 else scale}
