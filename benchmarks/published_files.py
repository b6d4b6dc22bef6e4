"""The small files of a published model: configs, tokenizer, preprocessing, chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.published_shapes import Model, Sizes

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE_START, IMAGE_END, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
_PRO_SPECIAL = [  # of Janus-Pro; Janus-1.3B has none of them
    IMAGE,
    "<patch_placeholder>",
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    "<|User|>",
    "<|Assistant|>",
]
_LLAMA_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
}
# For messages whose content is a list of {"type": "text", "text": ...} and {"type": "image"}.
_CHAT_TEMPLATE = """\
{% for message in messages %}\
{{ '<|User|>: ' if message.role == 'user' else \
'<|Assistant|>: ' if message.role == 'assistant' else '' }}\
{% for part in message.content %}\
{{ '<image_placeholder>\\n' if part.type == 'image' else part.text }}\
{% endfor %}\
{{ '<｜end▁of▁sentence｜>' if message.role == 'assistant' else '\\n\\n' }}\
{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}
"""


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file as published: indented, not escaped."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _llama_config(s: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.heads,
        "vocab_size": s.vocab,
    }


def deepseek_config(model: Model) -> dict[str, Any]:
    """Return ``config.json``: parts by the names of their variants, Llama's non-default sizes."""
    s = model.sizes
    named = Sizes()
    vision: dict[str, Any] = {
        "image_size": s.image_size,
        "model_name": "siglip_large_patch16_384",
        "select_feature": "same",
        "select_layer": -1,
    }
    codec: dict[str, Any] = {"image_token_size": s.codebook_size, "n_embed": s.codebook_dim}
    if s.width != named.width:  # no variant has these sizes: write them out
        vision |= {"width": s.width, "layers": s.vision_layers, "heads": s.vision_heads}
        vision |= {"patch_size": s.patch_size, "mlp_ratio": s.mlp_ratio}
        codec |= {"ch": s.ch, "ch_mult": s.ch_mult, "num_res_blocks": s.num_res_blocks}
        codec |= {"z_channels": s.z_channels, "codebook_size": s.codebook_size}
    language = {k: v for k, v in _llama_config(s).items() if _LLAMA_DEFAULTS.get(k) != v}
    if not model.pro:
        language["_attn_implementation"] = "flash_attention_2"
    head = {"image_token_embed": s.hidden, "image_token_size": s.codebook_size, "n_embed": s.hidden}

    def part(kind: str, cls: str, params: dict[str, Any]) -> dict[str, Any]:
        return {"cls": cls, "model_type": kind, "params": params}

    def projector(kind: str, inputs: int) -> dict[str, Any]:
        params = {
            "depth": 2,
            "input_dim": inputs,
            "n_embed": s.hidden,
            "projector_type": "mlp_gelu",
        }
        return part(kind, "MlpProjector", params)

    return {
        "aligner_config": projector("aligner", s.width),
        "architectures": ["MultiModalityCausalLM"],
        "gen_aligner_config": projector("gen_aligner", s.codebook_dim),
        "gen_head_config": part("gen_head", "vision_head", head),
        "gen_vision_config": part("gen_vision", "VQ-16", codec),
        "language_config": {**language, "torch_dtype": "bfloat16"},
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.2",
        "vision_config": part("vision", "CLIPVisionTower", vision),
    }


def _transformers_config(s: Sizes, ids: Callable[[str], int]) -> dict[str, Any]:
    text = {
        **_llama_config(s),
        "attention_bias": False,
        "bos_token_id": ids(BOS),
        "eos_token_id": ids(EOS),
        "pad_token_id": ids(PAD),
        "head_dim": s.hidden // s.heads,
        "hidden_act": "silu",
        "mlp_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    vision = {
        "attention_bias": True,
        "depth": 2,
        "hidden_act": "gelu",
        "hidden_size": s.width,
        "image_size": s.image_size,
        "layer_norm_eps": 1e-6,
        "mlp_ratio": float(s.mlp_ratio),
        "model_type": "janus_vision_model",
        "num_attention_heads": s.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": s.vision_layers,
        "num_image_tokens": s.grid**2,
        "patch_size": s.patch_size,
        "projection_dim": s.hidden,
        "use_qk_norm": False,
    }
    codec = {
        "base_channels": s.ch,
        "channel_multiplier": s.ch_mult,
        "double_latent": False,
        "dropout": 0.0,
        "embed_dim": s.codebook_dim,
        "hidden_act": "gelu",
        "image_token_embed_dim": s.hidden,
        "in_channels": 3,
        "latent_channels": s.z_channels,
        "model_type": "janus_vqgan",
        "num_embeddings": s.codebook_size,
        "num_hidden_layers": 2,
        "num_patches": s.grid,
        "num_res_blocks": s.num_res_blocks,
        "out_channels": 3,
        "projection_dim": s.hidden,
    }
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_id": ids(IMAGE),
        "model_type": "janus",
        "text_config": text,
        "tie_word_embeddings": False,
        "transformers_version": "5.23.0",
        "vision_config": vision,
        "vq_config": codec,
    }


def _special_tokens(model: Model) -> list[str]:
    """Return the special tokens in the order of their ids, which begin after the vocabulary."""
    image_tokens = [f"<image_token_{i}>" for i in range(model.sizes.grid**2)]
    between = [] if model.pro else [f"<filler_{model.entries + i}>" for i in range(2, 15)]
    own = _PRO_SPECIAL if model.pro else []
    return [BOS, EOS, *between, PAD, IMAGE_START, *image_tokens, IMAGE_END, *own]


def write_tokenizer(path: Path, model: Model, layout: str) -> Callable[[str], int]:
    """Write a byte-level BPE trained on Python's help texts; return a function from token to id.

    Filler entries, which no text reaches, fill the vocabulary up to the published size.
    """
    from pydoc_data.topics import topics

    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    splits = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\s+$"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=model.merged, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([topics[key] for key in sorted(topics)], trainer)
    data = json.loads(tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    vocabulary.update({f"<filler_{i}>": i for i in range(len(vocabulary), model.entries)})
    tokenizer = Tokenizer.from_str(json.dumps(data))
    special = [AddedToken(text, normalized=False, special=True) for text in _special_tokens(model)]
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if layout == "transformers":
        bos = (BOS, tokenizer.token_to_id(BOS))
        template = processors.TemplateProcessing(
            f"{BOS} $A", f"{BOS} $A {BOS}:1 $B:1", special_tokens=[bos]
        )
        tokenizer.post_processor = template
    tokenizer.save(str(path))
    return tokenizer.token_to_id


def write_transformers_files(folder: Path, model: Model, ids: Callable[[str], int]) -> None:
    """Write the small files of transformers' layout."""
    s = model.sizes
    generation = {
        "bos_token_id": ids(BOS),
        "eos_token_id": ids(EOS),
        "generation_kwargs": {"boi_token_id": ids(IMAGE_START)},
        "guidance_scale": 5,
        "pad_token_id": ids(PAD),
        "transformers_version": "5.23.0",
        "use_cache": True,
    }
    image = {
        "background_color": [127] * 3,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_processor_type": "JanusImageProcessor",
        "image_std": [0.5] * 3,
        "min_size": 14,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": s.image_size, "width": s.image_size},
    }
    tokens = {"boi_token": IMAGE_START, "eoi_token": IMAGE_END, "image_token": IMAGE}
    tokenizer = {
        "backend": "tokenizers",
        **tokens,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": _PRO_SPECIAL,
        "model_max_length": 16384,
        "model_specific_special_tokens": tokens,
        "processor_class": "JanusProcessor",
        "tokenizer_class": "TokenizersBackend",
        "use_default_system_prompt": True,
    }
    processor = {
        "image_processor": image,
        "num_image_tokens": s.grid**2,
        "processor_class": "JanusProcessor",
        "use_default_system_prompt": True,
    }
    write_json(folder / "config.json", _transformers_config(s, ids))
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "tokenizer_config.json", tokenizer)
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def write_deepseek_files(folder: Path, model: Model) -> None:
    """Write the small files of DeepSeek's layout."""
    preprocessor = {
        "background_color": [127] * 3,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_processor_type": "VLMImageProcessor",
        "image_size": model.sizes.image_size,
        "image_std": [0.5] * 3,
        "min_size": 14,
        "processor_class": "VLChatProcessor",
        "rescale_factor": 1 / 255,
    }
    processor = {
        "add_special_token": False,
        "ignore_id": -100,
        "image_tag": IMAGE,
        "mask_prompt": True,
        "num_image_tokens": model.sizes.grid**2,
        "processor_class": "VLChatProcessor",
        "sft_format": "deepseek" if model.pro else "deepseek_old",
    }
    spelled = {
        key: {
            "__type": "AddedToken",
            "content": text,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }
        for key, text in (("bos_token", BOS), ("eos_token", EOS))
    }
    tokenizer = {
        "add_bos_token": True,
        "add_eos_token": False,
        **spelled,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": None,
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "use_default_system_prompt": True,
    }
    special: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    if model.pro:
        special = {"additional_special_tokens": _PRO_SPECIAL, **special}
    write_json(folder / "config.json", deepseek_config(model))
    write_json(folder / "preprocessor_config.json", preprocessor)
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", tokenizer)
