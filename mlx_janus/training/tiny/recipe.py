"""The sizes of Janus-Tiny, and the steps, batches and learning rates of its training."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...config import (
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
from ...worlds import language
from ...worlds.shapes import SIDE


@dataclass(frozen=True)
class CodecRecipe:
    """The image codec's stage."""

    steps: int = 5600
    unquantized_steps: int = 250  # first steps, before the codebook is initialised
    batch: int = 8
    rate: float = 1e-3  # AdamW's highest learning rate
    muon_rate: float | None = 0.002  # Muon's highest learning rate; None: AdamW only
    open_share: float = 0.5  # share of images from ``worlds/open_scenes.py``


@dataclass(frozen=True)
class EncoderRecipe:
    """The vision encoder's stage, on labels of the images' patches."""

    steps: int = 1400
    batch: int = 32
    rate: float = 1e-3
    muon_rate: float = 0.01


@dataclass(frozen=True)
class JointRecipe:
    """A stage of the whole model, on both losses of the paper or on that of image tokens only."""

    steps: int = 3000
    answering_batch: int = 12  # conversations; 0: captions only, answering parts frozen
    drawing_batch: int = 24  # captions
    rate: float = 1e-3
    muon_rate: float = 0.01
    final_rate: float = 0.02  # learning rates at the end, as a share of the highest
    warmup: int = 40  # steps
    lookup_steps: int = 500  # first steps, with question shares of ``language.LOOKUPS``
    # Shares of questions after the lookup steps.
    shares: dict[str, float] = field(default_factory=lambda: dict(language.SHARES))
    paired: bool = True  # more scenes of two things or of one shape (``shapes.PAIRED``)
    tracking: float = 0.5  # weight of ``TrackingHead``'s loss
    placing: float = 1.0  # weight of ``PlacingHead``'s loss
    dropped_prompts: float = 0.1  # share of captions turned into pads, for guidance


@dataclass(frozen=True)
class TinyRecipe:
    """All stages, in order."""

    seed: int = 0
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    merged: CodecRecipe = field(
        default_factory=lambda: CodecRecipe(600, unquantized_steps=0, rate=3e-4, muon_rate=None)
    )
    encoder: EncoderRecipe = field(default_factory=EncoderRecipe)
    drawing: JointRecipe = field(
        default_factory=lambda: JointRecipe(
            4200, answering_batch=0, drawing_batch=48, final_rate=0.3, placing=0.0
        )
    )
    joint: JointRecipe = field(default_factory=JointRecipe)
    places: JointRecipe = field(
        default_factory=lambda: JointRecipe(
            1200,
            rate=6e-4,
            muon_rate=6e-3,
            lookup_steps=0,
            shares=dict(language.PLACES),
        )
    )
    share_of_last: float = 0.5  # weight of ``places`` in the final mean with ``joint``


CODEC = VQConfig(
    kind="vq",
    codebook_size=4096,
    codebook_dim=8,
    ch=12,
    ch_mult=(1, 2, 3, 8),
    num_res_blocks=1,
    z_channels=96,
    norm_groups=1,
)
ENCODER = SiglipConfig(
    kind="siglip",
    image_size=SIDE,
    patch_size=8,
    width=128,
    layers=3,
    heads=4,
    mlp_width=384,
)


def tiny_config(vocabulary: int) -> JanusConfig:
    """Return Janus-Tiny's config for a vocabulary of this size."""
    hidden = 192
    return JanusConfig(
        understanding=ENCODER,
        aligner=MLPConfig(kind="mlp_gelu", input_dim=ENCODER.width, output_dim=hidden),
        language=LlamaConfig(
            kind="llama",
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=416,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=6,
            head_dim=32,
            max_position_embeddings=1024,
        ),
        generation=VQGenerationConfig(
            kind="vq",
            image_size=SIDE,
            codec=CODEC,
            aligner=MLPConfig(kind="mlp_gelu", input_dim=CODEC.codebook_dim, output_dim=hidden),
            head=GenHeadConfig(
                kind="vision_head",
                input_dim=hidden,
                hidden_dim=hidden,
                output_dim=CODEC.codebook_size,
            ),
            cfg_weight=2.5,
            temperature=0.6,
        ),
        image=ImageConfig(image_size=SIDE),
        prompt=PromptConfig(system=""),
        dtype="float16",
    )
