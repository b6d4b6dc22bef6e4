"""Finding the options of a published model that this package does not follow.

The tables hold the options that DeepSeek's code, and transformers' classes for Janus, read or
write. Those that change numbers are read or refused elsewhere in this package. The others change
nothing at inference: they are for training, for speed or for bookkeeping. An option that is in no
table may change anything, so the user is told about it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..sections import shorten
from .published_images import read_image_options
from .published_prompt import GENERATION_FILE, PROCESSOR_FILE, TOKENIZER_CONFIG_FILE
from .published_values import Layout, json_or_empty

_MOST_NAMED = 8  # options that one note names

# Options of ``generate`` in transformers, which a model's own config may have too. Each comes with
# the values that change nothing. Null and empty values change nothing either.
_NEUTRAL_GENERATION: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": (),
    "bad_words_ids": (),
    "constraints": (),
    "diversity_penalty": (0,),
    "do_sample": (False,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_decoder_ids": (),
    "forced_eos_token_id": (),
    "length_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_p": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "renormalize_logits": (False,),
    "repetition_penalty": (1,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "temperature": (1,),
    "token_healing": (False,),
    "top_h": (),
    "top_k": (0, 50),  # 50 is transformers' default, and DeepSeek's code has no such limit
    "top_p": (1,),
    "typical_p": (1,),
    "watermarking_config": (),
}
# Options of a tokenizer, each with the values that change nothing.
_NEUTRAL_TOKENIZER: dict[str, tuple[Any, ...]] = {
    "add_bos_token": (True,),  # every prompt here begins with bos
    "add_eos_token": (False,),
    "add_prefix_space": (False,),
    "clean_up_tokenization_spaces": (False,),
    "errors": ("replace",),
    "split_special_tokens": (False,),
}


def _names(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


_HARMLESS_GENERATION = _names(
    """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind bos_token_id cache_config cache_implementation compile_config
    continuous_batching_config decoder_start_token_id disable_compile early_stopping eos_token_id
    generation_kwargs guidance_scale is_assistant low_memory max_cache_len max_length
    max_matching_ngram_size max_new_tokens max_time num_assistant_tokens
    num_assistant_tokens_schedule output_attentions output_hidden_states output_logits
    output_scores pad_token_id prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values
    return_dict_in_generate return_legacy_cache speculation_type target_lookbehind
    transformers_version use_cache use_mtp
    """
)
_ANY_CONFIG = _names(
    """
    add_cross_attention architectures attn_implementation auto_map bf16 chunk_size_feed_forward
    cross_attention_hidden_size dtype experts_implementation finetuning_task fp16
    gradient_checkpointing id2label is_decoder is_encoder_decoder label2id model_type name_or_path
    prefix problem_type pruned_heads return_dict sep_token_id task_specific_params tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class torch_dtype torchscript
    transformers_weights use_bfloat16 quantization_config
    """
)
_LLAMA = _names(
    """
    attention_bias attention_dropout head_dim hidden_act hidden_size initializer_range
    intermediate_size max_position_embeddings mlp_bias num_attention_heads num_hidden_layers
    num_key_value_heads partial_rotary_factor pretraining_tp rms_norm_eps rope_parameters
    rope_scaling rope_theta vocab_size
    """
)
_PROJECTOR = _names("depth input_dim n_embed projector_type")
# Options of each section's ``params`` in DeepSeek's layout, with the sizes that only this package
# reads (``published.py``).
_DEEPSEEK_PARAMS: dict[str, Collection[str]] = {
    "aligner_config": _PROJECTOR,
    "gen_aligner_config": _PROJECTOR,
    "gen_head_config": _names("image_token_embed image_token_size n_embed"),
    "gen_vision_config": _names(
        """
        ch ch_mult codebook_size image_token_size n_embed num_res_blocks z_channels
        """
    ),
    "vision_config": _names(
        """
        ckpt_path heads ignore_head image_size layers mlp_ratio model_name patch_size pixel_mean
        pixel_std select_feature select_layer select_layers weight_init width
        """
    ),
}
_TRANSFORMERS_SECTIONS: dict[str, Collection[str]] = {
    "text_config": _LLAMA,
    "vision_config": _names(
        """
        attention_bias attention_dropout depth hidden_act hidden_dropout_rate hidden_size image_size
        initializer_range layer_norm_eps mlp_ratio num_attention_heads num_channels
        num_hidden_layers num_image_tokens patch_size projection_dim projection_dropout use_qk_norm
        """
    ),
    # The converter of transformers wrote ``depth``, which nothing reads.
    "vq_config": _names(
        """
        base_channels channel_multiplier depth double_latent dropout embed_dim hidden_act
        image_token_embed_dim in_channels initializer_range latent_channels num_embeddings
        num_hidden_layers num_patches num_res_blocks out_channels projection_dim
        """
    ),
}
_PROCESSOR = _names(
    """
    add_special_token auto_map chat_template ignore_id image_end_tag image_processor
    image_start_tag image_tag mask_prompt num_image_tokens pad_tag processor_class sft_format
    use_default_system_prompt
    """
)
_IMAGES = _names(
    """
    auto_map background_color crop_size data_format default_to_square device disable_grouping
    do_center_crop do_convert_rgb do_normalize do_pad do_rescale do_resize
    feature_extractor_type image_mean image_processor_type image_size image_std
    input_data_format min_size model_input_names pad_size processor_class resample rescale_factor
    return_tensors size size_divisor
    """
)
_TOKENIZER = _names(
    """
    added_tokens_decoder additional_special_tokens auto_map backend boi_token bos_token
    chat_template cls_token device_map eoi_token eos_token extra_special_tokens from_slow
    image_token is_local legacy local_files_only mask_token max_length model_input_names
    model_max_length model_specific_special_tokens name_or_path pad_to_multiple_of pad_token
    pad_token_type_id padding padding_side processor_class return_tensors sep_token sp_model_kwargs
    spaces_between_special_tokens special_tokens_map_file stride tokenizer_class tokenizer_file
    tokenizer_type trim_offsets truncation truncation_side truncation_strategy unk_token
    use_default_system_prompt use_fast vocab_file
    """
)


def option_notes(folder: Path, layout: Layout, config: Mapping[str, Any]) -> list[str]:
    """Return notes for the user about the options in a folder's files that are not followed.

    These are unknown options, and known ones with a value that would change something.

    Args:
        folder: the model folder.
        layout: its layout.
        config: the content of its ``config.json``.

    Raises:
        ConfigError: a file is malformed.
    """
    tokenizer = json_or_empty(folder / TOKENIZER_CONFIG_FILE)
    processor = json_or_empty(folder / PROCESSOR_FILE)
    image_file, images = read_image_options(folder, layout)
    unknown: dict[str, list[str]] = {  # by file
        "config.json": list(_unknown_in_config(config, layout)),
        TOKENIZER_CONFIG_FILE: _unknown(tokenizer, (*_TOKENIZER, *_NEUTRAL_TOKENIZER)),
        PROCESSOR_FILE: _unknown(processor, _PROCESSOR),
    }
    # The options of images may be in ``PROCESSOR_FILE``, which has an entry already.
    unknown.setdefault(image_file.name, []).extend(_unknown(images, _IMAGES))
    language = config.get("language_config") if layout == "deepseek" else None
    not_followed = {
        TOKENIZER_CONFIG_FILE: _not_neutral(tokenizer, _NEUTRAL_TOKENIZER),
        "config.json": _not_neutral(language, _NEUTRAL_GENERATION, "language_config."),
    }
    if layout == "transformers":  # DeepSeek's code does not read this file
        generation = json_or_empty(folder / GENERATION_FILE)
        known = (*_HARMLESS_GENERATION, *_NEUTRAL_GENERATION)
        unknown[GENERATION_FILE] = _unknown(generation, known)
        not_followed[GENERATION_FILE] = _not_neutral(generation, _NEUTRAL_GENERATION)
    notes = []
    for file, names in unknown.items():
        if names:
            notes.append(f"{file}: unknown options have no effect: {_listed(names)}")
    for file, settings in not_followed.items():
        if settings:
            notes.append(f"{file}: options that are not followed: {_listed(settings)}")
    return notes


def _unknown_in_config(config: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """Yield the options in ``config.json`` that are in no table, each after its section's name."""
    any_model = (*_ANY_CONFIG, *_HARMLESS_GENERATION, *_NEUTRAL_GENERATION)
    sections: Mapping[str, Collection[str]]
    if layout == "transformers":
        sections = _TRANSFORMERS_SECTIONS
        yield from _unknown(config, (*any_model, *sections, "image_token_id"))
        for name, known in sections.items():
            yield from _unknown(config.get(name), (*any_model, *known), f"{name}.")
        return
    sections = _DEEPSEEK_PARAMS
    # Some fine-tunes repeat the language model's options at the top.
    yield from _unknown(config, (*any_model, *_LLAMA, *sections, "language_config"))
    yield from _unknown(config.get("language_config"), (*any_model, *_LLAMA), "language_config.")
    for name, known in sections.items():
        section = config.get(name)
        yield from _unknown(section, (*any_model, "cls", "params"), f"{name}.")
        if isinstance(section, dict):
            yield from _unknown(section.get("params"), known, f"{name}.params.")


def _unknown(options: Any, known: Collection[str], prefix: str = "") -> list[str]:
    """Return the names of options that are not known, each after ``prefix``.

    Names that begin with "_" are private to transformers and count as known. ``options`` may be any
    JSON value; if it is not an object, the list is empty.
    """
    if not isinstance(options, dict):
        return []
    names = [name for name in options if name not in known and not name.startswith("_")]
    return [f"{prefix}{name}" for name in names]


def _not_neutral(
    options: Any, neutral: Mapping[str, Collection[Any]], prefix: str = ""
) -> list[str]:
    """Return the options with a value that would change something, as "option value".

    Args:
        options: any JSON value; if it is not an object, the list is empty.
        neutral: the values that change nothing, by the option's name. Null and empty values never
            change anything.
        prefix: put before each name.
    """
    if not isinstance(options, dict):
        return []
    settings = []
    for name, values in neutral.items():
        value = options.get(name)
        if value not in (None, [], {}, "") and value not in values:
            settings.append(f"{prefix}{name} {shorten(value)}")
    return settings


def _listed(names: list[str]) -> str:
    """Return the first names as text, each cut to 80 characters, and the number of the others."""
    quoted = [ascii(name[:80]) for name in names[:_MOST_NAMED]]  # control characters escaped
    shown = ", ".join(text[1:-1] for text in quoted)
    further = len(names) - _MOST_NAMED
    return f"{shown} and {further} more" if further > 0 else shown
