"""Every tensor of the published models, by name, shape and file, derived from the sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine all shapes. The defaults are Janus-Pro-1B's and Janus-1.3B's."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    mlp_ratio: int = 4
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    codebook_used: int = 65536
    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 24
    heads: int = 16
    vocab: int = 102400

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Model:
    """A published repository, or a small one in the same form."""

    sizes: Sizes
    pro: bool = True  # Janus-Pro's tokenizer and roles, else Janus-1.3B's
    safetensors: bool = False  # else PyTorch's .bin
    merged: int = 4096  # entries of the vocabulary that text reaches
    entries: int = 100_000  # entries of the vocabulary before the special tokens
    layouts: tuple[str, ...] = ("deepseek",)


_TINY = Sizes(
    image_size=64,
    width=32,
    vision_layers=2,
    vision_heads=2,
    ch=32,
    ch_mult=(1, 1, 1, 1, 2),
    num_res_blocks=1,
    z_channels=32,
    codebook_size=128,
    hidden=64,
    intermediate=192,
    layers=2,
    heads=2,
    vocab=832,
)
MODELS = {
    "1b": Model(Sizes(), layouts=("deepseek", "transformers")),
    "1.3b": Model(Sizes(), pro=False, safetensors=True),
    "7b": Model(Sizes(hidden=4096, intermediate=11008, layers=30, heads=32)),
    "tiny": Model(_TINY, merged=768, entries=768, layouts=("deepseek", "transformers")),
}


@dataclass(frozen=True)
class Tensor:
    """A bfloat16 tensor of normally distributed values.

    If ``of`` is given, the values are those of that tensor, or of its ``part``-th equal piece.
    """

    name: str
    shape: tuple[int, ...]
    std: float = 1.0
    mean: float = 0.0
    of: Tensor | None = None
    part: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return 2 * self.count


def _linear(
    name: str, outputs: int, inputs: int, *kernel: int, bias: bool = True
) -> Iterator[Tensor]:
    """Yield the tensors of a linear layer or of a convolution.

    Args:
        name: the layer.
        outputs: channels of the output.
        inputs: channels of the input.
        kernel: height and width of a convolution's kernel; none for a linear layer.
        bias: whether the layer has a bias.
    """
    yield Tensor(
        f"{name}.weight", (outputs, inputs, *kernel), std=(inputs * math.prod(kernel)) ** -0.5
    )
    if bias:
        yield Tensor(f"{name}.bias", (outputs,), std=0.02)


def _norm(name: str, width: int, bias: bool = True) -> Iterator[Tensor]:
    """Yield the tensors of a normalization."""
    yield Tensor(f"{name}.weight", (width,), mean=1.0, std=0.05)
    if bias:
        yield Tensor(f"{name}.bias", (width,), std=0.02)


def _mlp(name: str, width: int, ratio: int) -> Iterator[Tensor]:
    """Yield the tensors of an MLP whose hidden layer is ``ratio`` times as wide."""
    yield from _linear(f"{name}.fc1", ratio * width, width)
    yield from _linear(f"{name}.fc2", width, ratio * width)


def _siglip(name: str, s: Sizes) -> Iterator[Tensor]:
    """Yield the tensors of SigLIP, the vision encoder."""
    width = s.width
    # The standard deviation is that of the embedded patches, to which the positions are added.
    yield Tensor(f"{name}.pos_embed", (1, s.grid**2, width), std=0.5)
    yield from _linear(f"{name}.patch_embed.proj", width, 3, s.patch_size, s.patch_size)
    for i in range(s.vision_layers):
        block = f"{name}.blocks.{i}"
        yield from _norm(f"{block}.norm1", width)
        yield from _linear(f"{block}.attn.qkv", 3 * width, width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _norm(f"{block}.norm2", width)
        yield from _mlp(f"{block}.mlp", width, s.mlp_ratio)
    yield from _norm(f"{name}.norm", width)
    pool = f"{name}.attn_pool"  # in the published files, but unused
    yield Tensor(f"{pool}.latent", (1, 1, width))
    yield from _linear(f"{pool}.q", width, width)
    yield from _linear(f"{pool}.kv", 2 * width, width)
    yield from _linear(f"{pool}.proj", width, width)
    yield from _norm(f"{pool}.norm", width)
    yield from _mlp(f"{pool}.mlp", width, s.mlp_ratio)


def _res(name: str, inputs: int, outputs: int) -> Iterator[Tensor]:
    """Yield the tensors of a residual block of the codec, by its numbers of channels."""
    yield from _norm(f"{name}.norm1", inputs)
    yield from _linear(f"{name}.conv1", outputs, inputs, 3, 3)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _linear(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _linear(f"{name}.nin_shortcut", outputs, inputs, 1, 1)


def _attention(name: str, width: int) -> Iterator[Tensor]:
    """Yield the tensors of an attention block of the codec."""
    yield from _norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _linear(f"{name}.{part}", width, width, 1, 1)


def _middle(name: str, width: int) -> Iterator[Tensor]:
    """Yield the tensors of the codec's blocks at the lowest resolution."""
    yield from _res(f"{name}.mid.0", width, width)
    yield from _attention(f"{name}.mid.1", width)
    yield from _res(f"{name}.mid.2", width, width)


def _levels(
    name: str, inputs: int, widths: list[int], blocks: int, lowest: int, change: str
) -> Iterator[Tensor]:
    """Yield the tensors of the levels of the codec's encoder or decoder.

    Every level except the last ends with a change of resolution.

    Args:
        name: the encoder or decoder.
        inputs: channels of the input.
        widths: channels of each level.
        blocks: residual blocks of each level.
        lowest: index of the level of the lowest resolution, which has attention blocks, too.
        change: "downsample" or "upsample".
    """
    for i, width in enumerate(widths):
        level = f"{name}.conv_blocks.{i}"
        for j in range(blocks):
            yield from _res(f"{level}.res.{j}", inputs, width)
            inputs = width
        if i == lowest:
            for j in range(blocks):
                yield from _attention(f"{level}.attn.{j}", width)
        if i < len(widths) - 1:
            yield from _linear(f"{level}.{change}.conv", width, width, 3, 3)


def _codec(name: str, s: Sizes) -> Iterator[Tensor]:
    """Yield the tensors of the image codec: encoder, decoder and codebook."""
    widths = [s.ch * mult for mult in s.ch_mult]
    top = widths[-1]
    yield from _linear(f"{name}.encoder.conv_in", s.ch, 3, 3, 3)
    yield from _levels(
        f"{name}.encoder", s.ch, widths, s.num_res_blocks, len(widths) - 1, "downsample"
    )
    yield from _middle(f"{name}.encoder", top)
    yield from _norm(f"{name}.encoder.norm_out", top)
    yield from _linear(f"{name}.encoder.conv_out", s.z_channels, top, 3, 3)
    yield from _linear(f"{name}.decoder.conv_in", top, s.z_channels, 3, 3)
    yield from _middle(f"{name}.decoder", top)
    yield from _levels(f"{name}.decoder", top, widths[::-1], s.num_res_blocks + 1, 0, "upsample")
    yield from _norm(f"{name}.decoder.norm_out", widths[0])
    yield from _linear(f"{name}.decoder.conv_out", 3, widths[0], 3, 3)
    yield Tensor(f"{name}.quantize.codebook_used", (s.codebook_used,), std=0.0)
    yield Tensor(f"{name}.quantize.embedding.weight", (s.codebook_size, s.codebook_dim))
    yield from _linear(f"{name}.quant_conv", s.codebook_dim, s.z_channels, 1, 1)
    yield from _linear(f"{name}.post_quant_conv", s.z_channels, s.codebook_dim, 1, 1)


def _llama(name: str, s: Sizes) -> Iterator[Tensor]:
    """Yield the tensors of the language model."""
    yield Tensor(f"{name}.model.embed_tokens.weight", (s.vocab, s.hidden))
    for i in range(s.layers):
        layer = f"{name}.model.layers.{i}"
        for part in "qkvo":
            yield from _linear(f"{layer}.self_attn.{part}_proj", s.hidden, s.hidden, bias=False)
        yield from _linear(f"{layer}.mlp.gate_proj", s.intermediate, s.hidden, bias=False)
        yield from _linear(f"{layer}.mlp.up_proj", s.intermediate, s.hidden, bias=False)
        yield from _linear(f"{layer}.mlp.down_proj", s.hidden, s.intermediate, bias=False)
        yield from _norm(f"{layer}.input_layernorm", s.hidden, bias=False)
        yield from _norm(f"{layer}.post_attention_layernorm", s.hidden, bias=False)
    yield from _norm(f"{name}.model.norm", s.hidden, bias=False)
    yield from _linear(f"{name}.lm_head", s.vocab, s.hidden, bias=False)


def deepseek_tensors(s: Sizes) -> Iterator[Tensor]:
    """Yield every tensor of DeepSeek's layout, in the order of its modules."""
    yield from _siglip("vision_model.vision_tower", s)
    yield from _linear("aligner.layers.0", s.hidden, s.width)
    yield from _linear("aligner.layers.2", s.hidden, s.hidden)
    yield from _codec("gen_vision_model", s)
    yield from _linear("gen_aligner.layers.0", s.hidden, s.codebook_dim)
    yield from _linear("gen_aligner.layers.2", s.hidden, s.hidden)
    yield from _linear("gen_head.output_mlp_projector", s.hidden, s.hidden)
    yield from _linear("gen_head.vision_head", s.codebook_size, s.hidden)
    yield Tensor("gen_embed.weight", (s.codebook_size, s.codebook_dim))
    yield from _llama("language_model", s)


# Applied one after the other.
_TO_TRANSFORMERS = [
    (r"^vision_model\.vision_tower\.", "model.vision_model."),
    (r"^(model\.vision_model)\.pos_embed$", r"\1.embeddings.position_embedding.weight"),
    (r"^(model\.vision_model)\.patch_embed\.proj\.", r"\1.embeddings.patch_embedding."),
    (r"^(model\.vision_model)\.norm\.", r"\1.post_layernorm."),
    (r"^(model\.vision_model)\.blocks\.(\d+)\.", r"\1.encoder.layers.\2."),
    (r"^(model\.vision_model\.encoder\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (
        r"^(model\.vision_model\.encoder\.layers\.\d+)\.attn\.proj\.",
        r"\1.self_attn.projection_layer.",
    ),
    (r"^gen_vision_model\.", "model.vqmodel."),
    (r"^(model\.vqmodel\.encoder)\.conv_blocks\.", r"\1.down."),
    (r"^(model\.vqmodel\.decoder)\.conv_blocks\.", r"\1.up."),
    (r"^(model\.vqmodel\..*)\.res\.", r"\1.block."),
    (r"^(model\.vqmodel\..*)\.mid\.0\.", r"\1.mid.block_1."),
    (r"^(model\.vqmodel\..*)\.mid\.1\.", r"\1.mid.attn_1."),
    (r"^(model\.vqmodel\..*)\.mid\.2\.", r"\1.mid.block_2."),
    (r"^aligner\.", "model.aligner."),
    (r"^gen_aligner\.", "model.generation_aligner."),
    (r"aligner\.layers\.0\.", "aligner.fc1."),
    (r"aligner\.layers\.2\.", "aligner.hidden_layers.0."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.", "model.generation_head."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
]


def transformers_tensors(s: Sizes) -> Iterator[Tensor]:
    """Yield every tensor of transformers' layout.

    The values are those of DeepSeek's layout. The names differ, q, k and v of the vision encoder
    are separate tensors, and unused tensors are left out.
    """
    for tensor in deepseek_tensors(s):
        if ".attn_pool." in tensor.name or tensor.name.endswith(".codebook_used"):
            continue
        name = tensor.name
        for pattern, replacement in _TO_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            shape = (tensor.shape[0] // 3, *tensor.shape[1:])
            for part, letter in enumerate("qkv"):
                split = name.replace(".attn.qkv.", f".self_attn.{letter}_proj.")
                yield Tensor(split, shape, of=tensor, part=part)
        else:
            shape = tensor.shape[1:] if "position_embedding" in name else tensor.shape
            yield Tensor(name, shape, of=tensor)
