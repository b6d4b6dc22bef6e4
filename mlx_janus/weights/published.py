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
from ..files import POINTER_ADVICE, is_git_pointer
from ..sections import shorten

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
            image=_read_preprocessing(folder, config.image),
            prompt=_read_prompt(folder, layout, config.prompt),
        )
        config = replace(config, generation=replace(config.generation, **_read_guidance(folder)))
    except ConfigError as error:
        # An error about a whole file names the path already; one about a single value does not.
        raise error if str(folder) in str(error) else ConfigError(f"{folder}: {error}") from None
    return config, layout


def read_published_sizes(path: Path) -> tuple[JanusConfig, Layout]:
    """Read a published model's ``config.json``, and detect its layout.

    Prompts, preprocessing and guidance keep their defaults, since other files describe them.

    Raises:
        ConfigError: the file is missing or malformed, or a size is impossible.
        UnsupportedModelError: the model is of another family, or has a part that is not supported.
    """
    data = read_model_json(path)
    try:
        layout = detect_layout(data)
        _refuse_quantized(data)
        config = _from_deepseek(data) if layout == "deepseek" else _from_transformers(data)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path} {error}") from None  # the path is its subject
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
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
        UnsupportedModelError: the config has one of them.
    """
    for key in ("quantization", "quantization_config"):
        if data.get(key):
            raise UnsupportedModelError(
                f"has {key!r}: another program has quantized the weights, which are not read; "
                "take the original model, such as deepseek-ai/Janus-Pro-1B, with bits=4 or bits=8"
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


def _section_params(data: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """Return the ``params`` of a section of DeepSeek's config.

    Raises:
        ConfigError: the section or its ``params`` is not a JSON object.
    """
    return _json_object(_json_object(data, section), "params")


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
    # A larger integer than any float would raise an OverflowError, in a product with a float.
    too_large = are_numbers and max(abs(width), abs(ratio)) > sys.float_info.max
    if not are_numbers or too_large or not math.isfinite(width * ratio):
        raise ConfigError(
            f"width and mlp_ratio must be numbers, got {str(width)[:40]!r} and {str(ratio)[:40]!r}"
        )
    return int(width * ratio)


def _tuple_if_list(value: Any) -> Any:
    """Return a tuple for a JSON list, since configs are frozen, and other values as they are."""
    return tuple(value) if isinstance(value, list) else value


def _from_deepseek(data: Mapping[str, Any]) -> JanusConfig:
    """Read a ``config.json`` in DeepSeek's layout.

    Raises:
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: a part of the model is not supported.
    """
    vision = _deepseek_vision(data)
    language = _read_language(_json_object(data, "language_config"), LLAMA_DEFAULTS)
    head = _section_params(data, "gen_head_config")
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
        UnsupportedModelError: the encoder is unknown, or its features are not the last layer's.
    """
    params = _section_params(data, "vision_config")
    variant = params.get("model_name", "siglip_large_patch16_384")
    needed = ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio")
    sizes = _variant_sizes(SIGLIP_VARIANTS, variant, params, needed)
    if sizes is None:
        raise UnsupportedModelError(
            f"names an unknown vision encoder {str(variant)[:60]!r}: {WORKING_MODELS}"
        )
    if params.get("select_layer", -1) != -1 or params.get("select_feature", "same") != "same":
        raise UnsupportedModelError(
            "takes features from inside the vision encoder; only its last layer is supported"
        )
    ratio = sizes.pop("mlp_ratio")  # ``SiglipConfig`` has the MLP's width instead
    return SiglipConfig(kind="siglip", **sizes, mlp_width=_mlp_width(sizes["width"], ratio))


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
    sizes["ch_mult"] = _tuple_if_list(sizes["ch_mult"])
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
    params = _section_params(data, section)
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
        UnsupportedModelError: the model is not a Llama, has biases, or scales rotary embeddings.
    """
    if data.get("model_type", "llama") != "llama":
        raise UnsupportedModelError(
            f"has a {str(data['model_type'])[:40]!r} language model; only Llama is supported"
        )
    if data.get("attention_bias") or data.get("mlp_bias"):
        raise UnsupportedModelError("has biases in its language model; Janus's Llama has none")
    sizes: dict[str, Any] = {}
    for key in LLAMA_DEFAULTS:  # its keys name the sizes; ``defaults`` has the values
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
    whole_numbers = type(heads) is int and type(hidden_size) is int
    if not whole_numbers or heads < 1 or hidden_size % heads:
        raise ConfigError(
            f"hidden_size {shorten(hidden_size)} must be a multiple of {shorten(heads)} heads"
        )
    return int(hidden_size // heads)


def _rope_theta(data: Mapping[str, Any]) -> Any:
    """Return the base of the rotary embeddings, an unchecked JSON value.

    Raises:
        ConfigError: ``rope_parameters`` or ``rope_scaling`` is not a JSON object.
        UnsupportedModelError: the embeddings are scaled.
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
    return rope.get("rope_theta", data.get("rope_theta", 10000.0))  # 10000: transformers' default


def _weight_dtype(data: Mapping[str, Any]) -> Dtype:
    """Return the type of the weights: the entire model's, else the language model's, else bfloat16.

    Raises:
        ConfigError: the type is unknown, or the entire model has none and ``language_config`` is
            missing.
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
        UnsupportedModelError: the codec has double latents.
    """
    if codec.get("double_latent"):
        raise UnsupportedModelError(
            "has an image codec with double latents; Janus's has single ones"
        )
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
            ch_mult=_tuple_if_list(_required(codec, "channel_multiplier")),
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
            input_dim=embedding_width,
            hidden_dim=codec.get("image_token_embed_dim", hidden_size),
            output_dim=codebook_size,
        ),
    )


def _transformers_vision(data: Mapping[str, Any]) -> SiglipConfig:
    """Read the vision encoder's config in transformers' layout, the section ``vision_config``.

    Raises:
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: the encoder normalises q and k, or its activation is not GELU.
    """
    if data.get("use_qk_norm"):
        raise UnsupportedModelError("normalises q and k in its vision encoder; Janus's does not")
    if data.get("hidden_act", "gelu") != "gelu":
        raise UnsupportedModelError(
            f"has {str(data['hidden_act'])[:40]!r} in its vision encoder; Janus has 'gelu'"
        )
    width = _required(data, "hidden_size")
    return SiglipConfig(
        kind="siglip",
        image_size=_required(data, "image_size"),
        patch_size=_required(data, "patch_size"),
        width=width,
        layers=_required(data, "num_hidden_layers"),
        heads=_required(data, "num_attention_heads"),
        mlp_width=_mlp_width(width, data.get("mlp_ratio", 4.0)),
        layer_norm_eps=data.get("layer_norm_eps", 1e-6),
    )


def _json_or_empty(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; return an empty one if there is no file.

    Raises:
        ConfigError: the file is malformed.
    """
    return read_model_json(path) if path.exists() else {}


def _read_preprocessing(folder: Path, image: ImageConfig) -> ImageConfig:
    """Replace the default image preprocessing by a folder's, where the folder has values.

    ``do_normalize`` is not read, since old mirrors of Janus-1.3B have a wrong one.

    Raises:
        ConfigError: a file is malformed, or a value is impossible.
    """
    data = _json_or_empty(folder / "preprocessor_config.json")
    if not data:  # some folders have these entries in processor_config.json
        data = _json_or_empty(folder / "processor_config.json").get("image_processor") or {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{folder / 'processor_config.json'}: image_processor must be a JSON object"
        )
    given = {
        "min_size": data.get("min_size"),
        "background": _tuple_if_list(data.get("background_color")),
        "mean": _tuple_if_list(data.get("image_mean")),
        "std": _tuple_if_list(data.get("image_std")),
    }
    return replace(image, **{key: value for key, value in given.items() if value is not None})


def _read_prompt(folder: Path, layout: Layout, prompt: PromptConfig) -> PromptConfig:
    """Replace the default control tokens and roles by a folder's, where the folder has some.

    Raises:
        ConfigError: a file is malformed, or ``tokenizer.json`` is missing in DeepSeek's layout.
    """
    tokenizer_config = _json_or_empty(folder / "tokenizer_config.json")
    texts = {key: _token_text(tokenizer_config.get(f"{key}_token")) for key in ("bos", "eos")}
    prompt = replace(prompt, **{key: text for key, text in texts.items() if text})
    if layout == "deepseek":
        tag = _json_or_empty(folder / "processor_config.json").get("image_tag")
        prompt = replace(prompt, image=tag) if isinstance(tag, str) and tag else prompt
        # In DeepSeek's layout, only Janus-1.3B has plain roles ("User"), and only its tokenizer
        # lacks the image placeholder. Its sft_format is wrong in some mirrors.
        plain_roles = prompt.image not in _tokenizer_tokens(folder)
    else:
        # Here a chat template without the default role "<|User|>" means plain roles.
        template = _chat_template(folder, tokenizer_config)
        plain_roles = bool(template) and prompt.user not in template
    return replace(prompt, user="User", assistant="Assistant") if plain_roles else prompt


def _token_text(token: Any) -> str | None:
    """Return a token's text from its JSON value: a string, or an object with ``content``.

    Returns:
        None for any other value.
    """
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _tokenizer_tokens(folder: Path) -> set[str]:
    """Return the texts of all tokens in ``tokenizer.json``: the vocabulary and the added tokens.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    data = read_model_json(folder / "tokenizer.json")
    tokens: set[str] = set()
    added = data.get("added_tokens")
    if isinstance(added, list):
        tokens |= {str(entry.get("content")) for entry in added if isinstance(entry, dict)}
    bpe = data.get("model")
    vocabulary = bpe.get("vocab") if isinstance(bpe, dict) else None
    if isinstance(vocabulary, dict):
        tokens |= set(vocabulary)
    return tokens


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str:
    """Return a folder's chat template; "" if it has none.

    It is read from the first of ``chat_template.jinja``, ``chat_template.json`` and
    ``tokenizer_config.json`` that has one.

    Raises:
        ConfigError: a file cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): download it again") from None
        if is_git_pointer(template.encode()):
            raise ConfigError(
                f"{path} is a Git LFS pointer and not the file itself: {POINTER_ADVICE}"
            )
        return template
    in_json = _json_or_empty(folder / "chat_template.json").get("chat_template")
    from_json = in_json or tokenizer_config.get("chat_template") or ""
    return from_json if isinstance(from_json, str) else str(from_json)


def _read_guidance(folder: Path) -> dict[str, Any]:
    """Return the folder's guidance scale as ``{"cfg_weight": scale}``, or {} if it has none.

    Raises:
        ConfigError: ``generation_config.json`` is malformed.
    """
    scale = _json_or_empty(folder / "generation_config.json").get("guidance_scale")
    return {} if scale is None else {"cfg_weight": scale}
