"""The stages of the network whose numbers are compared with the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from ..decode.sampling import guide
from ..models.janus import JanusModel

Numbers = Mapping[str, np.ndarray]
Pair = tuple[mx.array, str]  # our output, and the name of the reference's


@dataclass(frozen=True)
class Stage:
    """A part of the network with stored inputs and outputs."""

    name: str
    compute: Callable[[JanusModel, Numbers], Iterator[Pair]]
    weights: Literal["float32", "float", "8 bits", "any bits"]
    """How a model is quantized here: the codec is always float32, the vision encoder a float type,
    the adaptors and the image head have 8 bits at least, and the language model any bits."""


def _nhwc(array: np.ndarray) -> mx.array:
    """Change the layout of images: (N, C, H, W) -> (N, H, W, C)."""
    return mx.array(array.transpose(0, 2, 3, 1))


def _nchw(array: mx.array) -> mx.array:
    """Change the layout of images: (N, H, W, C) -> (N, C, H, W)."""
    return array.transpose(0, 3, 1, 2)


def _encoder(model: JanusModel, numbers: Numbers) -> Iterator[Pair]:
    """Yield the outputs of SigLIP's parts."""
    pixels = _nhwc(numbers["vision.pixel_values"])
    tower = model.vision_model.vision_tower
    patches = tower.embed(pixels)
    yield patches, "vision.embed"
    yield tower.blocks[0](patches), "vision.block0"
    yield model.vision_model(pixels), "vision.out"


def _aligner(model: JanusModel, numbers: Numbers) -> Iterator[Pair]:
    """Yield an image's features for the language model."""
    yield model.understand(_nhwc(numbers["vision.pixel_values"])), "aligner.out"


def _language(model: JanusModel, numbers: Numbers) -> Iterator[Pair]:
    """Yield embeddings, the output of a layer, hidden states and logits of a text."""
    embeddings = model.embed_text(mx.array(numbers["text.input_ids"]))
    yield embeddings, "text.embeds"
    layer = model.language_model.model.layers[0]
    yield layer(embeddings, mask="causal"), "text.layer0"
    hidden = model.hidden_states(embeddings)
    yield hidden, "text.hidden"
    yield model.text_logits(hidden[:, -4:]), "text.logits_last4"


def _image_embedding(model: JanusModel, numbers: Numbers) -> Iterator[Pair]:
    """Yield the embeddings of image tokens."""
    ids = mx.array(numbers["gen_embeds.ids"])
    yield model.embed_image_tokens(ids[None])[0], "gen_embeds.out"


def _image_head(model: JanusModel, numbers: Numbers) -> Iterator[Pair]:
    """Yield the logits of the image head, for stored hidden states."""
    hidden = mx.array(numbers["gen_head.in"]).astype(model.dtype)
    yield model.image_logits(hidden), "gen_head.out"


def _drawing(model: JanusModel, numbers: Numbers) -> Iterator[Pair]:
    """Yield hidden states and guided logits of 16 positions, through the KV cache.

    Each step reads the reference's token, so that a wrong choice does not change later positions.
    """
    cache = model.make_cache()
    embeddings = model.embed_text(mx.array(numbers["gen.tokens"]))
    hidden = model.hidden_states(embeddings, cache)[:, -1:]
    states = []
    guided = []
    for token in numbers["gen.greedy_tokens"].tolist():
        states.append(hidden[:, 0])
        logits = model.image_logits(hidden[:, 0])
        # Row 0 is the conditional one, and row 1 the unconditional. 5 is the weight of guidance.
        guided.append(guide(logits[:1], logits[1:], 5.0)[0])
        step = model.embed_image_tokens(mx.array([[token], [token]]))
        hidden = model.hidden_states(step, cache)
    yield mx.stack(states), "gen.hidden"
    yield mx.stack(guided), "gen.logits_cfg"


def _codec_decoder(model: JanusModel, numbers: Numbers) -> Iterator[Pair]:
    """Yield the outputs of the codec's decoder."""
    codes = mx.array(numbers["vq.codes"])
    codec = model.gen_vision_model
    vectors = codec.quantize.look_up(codes).reshape(1, 4, 4, -1)  # (B, h, w, codebook_dim)
    yield _nchw(vectors), "vq.quant"
    x = codec.decoder.conv_in(codec.post_quant_conv(vectors))
    for block in codec.decoder.mid:
        x = block(x)
    yield _nchw(x), "vq.dec_mid"
    yield _nchw(model.decode_image_tokens(codes)), "vq.dec"


def _codec_encoder(model: JanusModel, numbers: Numbers) -> Iterator[Pair]:
    """Yield the outputs of the codec's encoder, before the search in the codebook."""
    codec = model.gen_vision_model
    latents = codec.encoder(_nhwc(numbers["vq.enc_in"]))
    yield _nchw(codec.quant_conv(latents)), "vq.enc_quant_conv"


STAGES = (
    Stage("vision encoder", _encoder, "float"),
    Stage("vision adaptor", _aligner, "8 bits"),
    Stage("language model", _language, "any bits"),
    Stage("image embedding", _image_embedding, "8 bits"),
    Stage("image head", _image_head, "8 bits"),
    Stage("guided image logits", _drawing, "any bits"),
    Stage("codec decoder", _codec_decoder, "float32"),
    Stage("codec encoder", _codec_encoder, "float32"),
)
