"""A model of a published shape with random weights, in memory only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx_janus  # noqa: F401  OpenBLAS before MLX

# isort: split
import mlx.core as mx

from benchmarks.published_shapes import MODELS, Sizes
from mlx_janus.config import (
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
)
from mlx_janus.models.janus import JanusModel
from mlx_janus.weights.load import with_quantization
from mlx_janus.weights.quantize import quantize_model


def random_model(shape: str, dtype: Dtype, bits: int | None = None) -> JanusModel:
    """Build a model of a published shape with lazy random weights; the codec's are float32."""
    sizes = replace(config(MODELS[shape].sizes), dtype=dtype)
    model = JanusModel(with_quantization(sizes, bits, Path(shape)))
    for name, part in model.children().items():
        if name != "gen_vision_model":
            part.set_dtype(getattr(mx, dtype))
    if model.config.quantization:
        quantize_model(model, model.config.quantization)
    model.eval()
    return model


def config(s: Sizes) -> JanusConfig:
    """Return the sizes as a config."""
    return JanusConfig(
        understanding=SiglipConfig(
            kind="siglip",
            image_size=s.image_size,
            patch_size=s.patch_size,
            width=s.width,
            layers=s.vision_layers,
            heads=s.vision_heads,
            mlp_width=s.mlp_ratio * s.width,
        ),
        aligner=MLPConfig(kind="mlp_gelu", input_dim=s.width, output_dim=s.hidden),
        language=LlamaConfig(
            kind="llama",
            vocab_size=s.vocab,
            hidden_size=s.hidden,
            intermediate_size=s.intermediate,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.heads,
            head_dim=s.hidden // s.heads,
            max_position_embeddings=16384,
        ),
        generation=VQGenerationConfig(
            kind="vq",
            image_size=s.image_size,
            codec=VQConfig(
                kind="vq",
                codebook_size=s.codebook_size,
                codebook_dim=s.codebook_dim,
                ch=s.ch,
                ch_mult=s.ch_mult,
                num_res_blocks=s.num_res_blocks,
                z_channels=s.z_channels,
            ),
            aligner=MLPConfig(kind="mlp_gelu", input_dim=s.codebook_dim, output_dim=s.hidden),
            head=GenHeadConfig(
                kind="vision_head",
                input_dim=s.hidden,
                hidden_dim=s.hidden,
                output_dim=s.codebook_size,
            ),
        ),
        image=ImageConfig(image_size=s.image_size),
        prompt=PromptConfig(),
        dtype="float32",
    )
