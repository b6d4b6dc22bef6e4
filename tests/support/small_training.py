"""Janus-Tiny's training at small sizes: the same stages, in quick steps."""

from __future__ import annotations

from dataclasses import replace

from mlx_janus.config import JanusConfig
from mlx_janus.training.tiny import codec, recipe, vocabulary
from mlx_janus.training.tiny.recipe import TinyRecipe

SMALL_CODEC = replace(recipe.CODEC, codebook_size=512, ch=6, z_channels=16)
SMALL_ENCODER = replace(recipe.ENCODER, width=64, layers=2, heads=2, mlp_width=128)
_tiny_config = recipe.tiny_config


def small_config(vocabulary: int) -> JanusConfig:
    """Return a config like Janus-Tiny's, with narrow networks of few layers."""
    hidden = 64
    config = _tiny_config(vocabulary)
    language = replace(
        config.language,
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    generation = replace(
        config.generation,
        codec=SMALL_CODEC,
        aligner=replace(config.generation.aligner, output_dim=hidden),
        head=replace(
            config.generation.head,
            input_dim=hidden,
            hidden_dim=hidden,
            output_dim=SMALL_CODEC.codebook_size,
        ),
    )
    return replace(
        config,
        understanding=SMALL_ENCODER,
        aligner=replace(config.aligner, input_dim=SMALL_ENCODER.width, output_dim=hidden),
        language=language,
        generation=generation,
    )


def small_recipe(seed: int = 0) -> TinyRecipe:
    """Return Janus-Tiny's recipe with small batches."""
    whole = TinyRecipe(seed)
    return replace(
        whole,
        codec=replace(whole.codec, batch=2),
        merged=replace(whole.merged, batch=2),
        encoder=replace(whole.encoder, batch=2),
        drawing=replace(whole.drawing, drawing_batch=4),
        joint=replace(whole.joint, answering_batch=2, drawing_batch=2),
        places=replace(whole.places, answering_batch=2, drawing_batch=2),
    )


def install() -> None:
    """Give this process's command ``train tiny`` the small sizes, before it imports them."""
    for name, small in (
        ("CODEC", SMALL_CODEC),
        ("ENCODER", SMALL_ENCODER),
        ("tiny_config", small_config),
        ("TinyRecipe", small_recipe),
    ):
        setattr(recipe, name, small)
    codec._SURVEY_BATCHES = 10
    vocabulary._SCENES = 400
