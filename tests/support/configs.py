"""Published configs, to edit and to write."""

from __future__ import annotations

from typing import Any


def published_1b(language: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return a config in the form that DeepSeek publishes.

    Sizes go by variant, and the language model names only what differs from the defaults.
    """

    def part(cls: str, **params: Any) -> dict[str, Any]:
        return {"cls": cls, "model_type": cls, "params": params}

    hidden = (language or {}).get("hidden_size", 4096)
    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "torch_dtype": "bfloat16",
        "aligner_config": part(
            "MlpProjector", depth=2, input_dim=1024, n_embed=hidden, projector_type="mlp_gelu"
        ),
        "gen_aligner_config": part(
            "MlpProjector", depth=2, input_dim=8, n_embed=hidden, projector_type="mlp_gelu"
        ),
        "gen_head_config": part(
            "vision_head", image_token_embed=hidden, image_token_size=16384, n_embed=hidden
        ),
        "gen_vision_config": part("VQ-16", image_token_size=16384, n_embed=8),
        "vision_config": part(
            "CLIPVisionTower",
            image_size=384,
            model_name="siglip_large_patch16_384",
            select_feature="same",
            select_layer=-1,
        ),
        "language_config": {
            "max_position_embeddings": 16384,
            "num_hidden_layers": 30,
            "vocab_size": 102400,
            "model_type": "llama",
            **(language or {}),
        },
        **changes,
    }
