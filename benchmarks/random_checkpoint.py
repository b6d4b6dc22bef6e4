"""Write a model folder as published, with random weights: ``python benchmarks/random_checkpoint.py OUTPUT``.

Every file, name, shape and dtype is that of the published repository, so that conversion, loading, speed and memory
can be tried at real size without the real weights. Only the values differ: they are drawn so that activations stay of
order 1, and an answer or a picture of such a model means nothing. ``--model tiny`` takes a second.

Neither torch nor much memory is needed: weights are made in blocks of 8 MiB and streamed into the file. Each tensor is
seeded by its name alone (``tensor_bits`` makes any one of them again), and both layouts hold the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

BLOCK = 1 << 22  # normals drawn for one tensor; a larger tensor repeats them, rolled
ROLL = 1_000_003  # odd and prime: two rows of a repeated block never coincide
MAX_SHARD = 10_000_000_000  # bytes; transformers' "10GB", the default when the models were published


# ---- models -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Everything that shapes depend on. The defaults are Janus-Pro-1B's and Janus-1.3B's."""

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
    """One published repository (or a small one in the same form)."""

    sizes: Sizes
    pro: bool = True  # Janus-Pro's tokenizer and roles, else Janus-1.3B's
    safetensors: bool = False  # else PyTorch's .bin
    merged: int = 4096  # entries of the vocabulary that text reaches
    entries: int = 100_000  # entries of the vocabulary before the special tokens
    layouts: tuple[str, ...] = ("deepseek",)


_TINY = Sizes(
    image_size=64, width=32, vision_layers=2, vision_heads=2, ch=32, ch_mult=(1, 1, 1, 1, 2), num_res_blocks=1,
    z_channels=32, codebook_size=128, hidden=64, intermediate=192, layers=2, heads=2, vocab=832,
)  # fmt: skip
MODELS = {
    "1b": Model(Sizes(), layouts=("deepseek", "transformers")),
    "1.3b": Model(Sizes(), pro=False, safetensors=True),
    "7b": Model(Sizes(hidden=4096, intermediate=11008, layers=30, heads=32)),
    "tiny": Model(_TINY, merged=768, entries=768, layouts=("deepseek", "transformers")),
}


# ---- names and shapes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """One bf16 tensor of normals. With ``of``, it is the ``part``-th equal piece of that other tensor."""

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


def _linear(name: str, outputs: int, inputs: int, *kernel: int, bias: bool = True) -> Iterator[Tensor]:
    """A linear layer or, with a kernel, a convolution."""
    yield Tensor(f"{name}.weight", (outputs, inputs, *kernel), std=(inputs * math.prod(kernel)) ** -0.5)
    if bias:
        yield Tensor(f"{name}.bias", (outputs,), std=0.02)


def _norm(name: str, width: int, bias: bool = True) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (width,), mean=1.0, std=0.05)
    if bias:
        yield Tensor(f"{name}.bias", (width,), std=0.02)


def _mlp(name: str, width: int, ratio: int) -> Iterator[Tensor]:
    yield from _linear(f"{name}.fc1", ratio * width, width)
    yield from _linear(f"{name}.fc2", width, ratio * width)


def _siglip(name: str, s: Sizes) -> Iterator[Tensor]:
    width = s.width
    yield Tensor(f"{name}.pos_embed", (1, s.grid**2, width), std=0.5)  # as large as the patches' own embeddings
    yield from _linear(f"{name}.patch_embed.proj", width, 3, s.patch_size, s.patch_size)
    for i in range(s.vision_layers):
        block = f"{name}.blocks.{i}"
        yield from _norm(f"{block}.norm1", width)
        yield from _linear(f"{block}.attn.qkv", 3 * width, width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _norm(f"{block}.norm2", width)
        yield from _mlp(f"{block}.mlp", width, s.mlp_ratio)
    yield from _norm(f"{name}.norm", width)
    pool = f"{name}.attn_pool"  # in the published files, used by nobody
    yield Tensor(f"{pool}.latent", (1, 1, width))
    yield from _linear(f"{pool}.q", width, width)
    yield from _linear(f"{pool}.kv", 2 * width, width)
    yield from _linear(f"{pool}.proj", width, width)
    yield from _norm(f"{pool}.norm", width)
    yield from _mlp(f"{pool}.mlp", width, s.mlp_ratio)


def _res(name: str, inputs: int, outputs: int) -> Iterator[Tensor]:
    yield from _norm(f"{name}.norm1", inputs)
    yield from _linear(f"{name}.conv1", outputs, inputs, 3, 3)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _linear(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _linear(f"{name}.nin_shortcut", outputs, inputs, 1, 1)


def _attention(name: str, width: int) -> Iterator[Tensor]:
    yield from _norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _linear(f"{name}.{part}", width, width, 1, 1)


def _middle(name: str, width: int) -> Iterator[Tensor]:
    yield from _res(f"{name}.mid.0", width, width)
    yield from _attention(f"{name}.mid.1", width)
    yield from _res(f"{name}.mid.2", width, width)


def _levels(name: str, inputs: int, widths: list[int], blocks: int, lowest: int, change: str) -> Iterator[Tensor]:
    """Residual levels; attention at the ``lowest`` resolution, a change of resolution after all but the last level."""
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
    widths = [s.ch * mult for mult in s.ch_mult]
    top = widths[-1]
    yield from _linear(f"{name}.encoder.conv_in", s.ch, 3, 3, 3)
    yield from _levels(f"{name}.encoder", s.ch, widths, s.num_res_blocks, len(widths) - 1, "downsample")
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
    """Every tensor of DeepSeek's layout, in the order of its modules."""
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
    (r"^(model\.vision_model\.encoder\.layers\.\d+)\.attn\.proj\.", r"\1.self_attn.projection_layer."),
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
    """Every tensor of transformers' layout: other names, q, k and v apart, without what nobody uses."""
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


# ---- values -------------------------------------------------------------------------------------------------------


def _block(tensor: Tensor, seed: int) -> np.ndarray:
    """Up to ``BLOCK`` normals as the bits of bf16, rounded to nearest even."""
    digest = hashlib.sha256(tensor.name.encode()).digest()
    random = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    values = random.standard_normal(min(tensor.count, BLOCK), dtype=np.float32)
    values *= np.float32(tensor.std)
    values += np.float32(tensor.mean)
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16)


def tensor_chunks(tensor: Tensor, seed: int = 0) -> Iterator[np.ndarray]:
    """The values of a tensor in order: uint16 arrays that are bits of bf16."""
    if tensor.of is not None:
        if tensor.of.count == tensor.count:
            yield from tensor_chunks(tensor.of, seed)
        else:
            yield tensor_bits(tensor.of, seed).reshape(-1)[tensor.part * tensor.count :][: tensor.count]
        return
    block = _block(tensor, seed)
    left, shift = tensor.count, 0
    while left:
        for piece in (block[shift:], block[:shift]):
            piece = piece[:left]
            left -= piece.size
            if piece.size:
                yield piece
        shift = (shift + ROLL) % block.size


def tensor_bits(tensor: Tensor, seed: int = 0) -> np.ndarray:
    """A whole tensor as uint16 bits of bf16, in its shape."""
    return np.concatenate(list(tensor_chunks(tensor, seed))).reshape(tensor.shape)


# ---- weight files -------------------------------------------------------------------------------------------------

Progress = Callable[[int], Any]  # called with bytes written


def _write_safetensors(path: Path, tensors: Iterable[Tensor], seed: int, progress: Progress) -> None:
    """One safetensors file, tensors in the order of their names as the safetensors library leaves them."""
    ordered = sorted(tensors, key=lambda t: t.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in ordered:
        header[t.name] = {"dtype": "BF16", "shape": t.shape, "data_offsets": [end, end + t.bytes]}
        end += t.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in ordered:
            for chunk in tensor_chunks(t, seed):
                file.write(chunk)
                progress(chunk.nbytes)


class _Pickle:
    """The instructions that Python's pickler (protocol 2) gives for ``{name: bf16 tensor}``, memo numbers included."""

    def __init__(self) -> None:
        self.code = bytearray(b"\x80\x02}")
        self.memo: dict[str, int] = {}
        self.puts = 0
        self._put()

    def state_dict(self, tensors: list[Tensor]) -> bytes:
        for start in range(0, len(tensors), 1000):  # the pickler's batches
            self.code += b"("
            for key, tensor in enumerate(tensors[start : start + 1000], start):
                self._string(tensor.name)
                self._tensor(tensor, str(key))
            self.code += b"u"
        return bytes(self.code + b".")

    def _tensor(self, tensor: Tensor, key: str) -> None:
        self._remembered("storage function", b"ctorch._utils\n_rebuild_tensor_v2\n")
        self.code += b"(("
        self._remembered("storage", _string("storage"))
        self._remembered("storage class", b"ctorch\nBFloat16Storage\n")
        self._string(key)
        self._remembered("cpu", _string("cpu"))
        self.code += _integer(tensor.count) + b"t"
        self._put()
        self.code += b"Q" + _integer(0)  # the storage by its persistent id, offset 0
        self._tuple(tensor.shape)
        self._tuple(tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))))
        self.code += b"\x89"  # requires_grad False, then empty hooks
        self._remembered("dict class", b"ccollections\nOrderedDict\n")
        self.code += b")R"
        self._put()
        self.code += b"t"
        self._put()
        self.code += b"R"
        self._put()

    def _tuple(self, items: tuple[int, ...]) -> None:
        body = b"".join(map(_integer, items))
        short = {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(items))
        self.code += body + short if short else b"(" + body + b"t"
        self._put()

    def _string(self, text: str) -> None:
        self.code += _string(text)
        self._put()

    def _put(self) -> None:
        self.code += b"q" + struct.pack("<B", self.puts) if self.puts < 256 else b"r" + struct.pack("<I", self.puts)
        self.puts += 1

    def _remembered(self, what: str, code: bytes) -> None:
        """Said once, then recalled; every number is below 256 because all are said with the first tensor."""
        if what in self.memo:
            self.code += b"h" + struct.pack("<B", self.memo[what])
            return
        self.memo[what] = self.puts
        self.code += code
        self._put()


def _string(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 1 << 8:
        return b"K" + struct.pack("<B", value)
    return b"M" + struct.pack("<H", value) if value < 1 << 16 else b"J" + struct.pack("<i", value)


def _write_torch(path: Path, tensors: list[Tensor], seed: int, progress: Progress) -> None:
    """One ``.bin`` file as ``torch.save`` of a plain dict leaves it: a zip of stored, 64-byte aligned entries."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def entry(name: str, size: int, chunks: Iterable[Any]) -> None:
            info = zipfile.ZipInfo(f"{path.stem}/{name}")
            info.file_size = size
            zip64 = size > 1 << 30
            head = file.tell() + 30 + len(info.filename.encode()) + 4 + (20 if zip64 else 0)
            info.extra = struct.pack("<2sH", b"FB", -head % 64) + b"Z" * (-head % 64)  # torch's own padding
            with archive.open(info, "w", force_zip64=zip64) as out:
                for chunk in chunks:
                    out.write(chunk)
            info.extra = b""  # padding belongs before the data, not in the directory

        def data(tensor: Tensor) -> Iterator[np.ndarray]:
            for chunk in tensor_chunks(tensor, seed):
                yield chunk
                progress(chunk.nbytes)

        for name, text in (("data.pkl", _Pickle().state_dict(tensors)), ("byteorder", b"little")):
            entry(name, len(text), [text])
        for key, tensor in enumerate(tensors):
            entry(f"data/{key}", tensor.bytes, data(tensor))
        entry("version", 2, [b"3\n"])


def _shards(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors in order, a new file before the one that would take a file beyond ``MAX_SHARD``."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size + tensor.bytes > MAX_SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _write_weights(folder: Path, model: Model, layout: str, seed: int, progress: Progress) -> None:
    if layout == "transformers":
        _write_safetensors(folder / "model.safetensors", transformers_tensors(model.sizes), seed, progress)
        return
    tensors = list(deepseek_tensors(model.sizes))
    if model.safetensors:
        _write_safetensors(folder / "model.safetensors", tensors, seed, progress)
        return
    shards = _shards(tensors)
    if len(shards) == 1:
        _write_torch(folder / "pytorch_model.bin", tensors, seed, progress)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"pytorch_model-{i:05d}-of-{len(shards):05d}.bin"
        _write_torch(folder / name, shard, seed, progress)
        weight_map.update({tensor.name: name for tensor in shard})
    index = {"metadata": {"total_size": sum(t.bytes for t in tensors)}, "weight_map": weight_map}
    _write_json(folder / "pytorch_model.bin.index.json", index)


# ---- config files -------------------------------------------------------------------------------------------------

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE_START, IMAGE_END, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
_OTHER_SPECIAL = [
    "<patch_placeholder>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>", "<|Assistant|>",
]  # fmt: skip
_LLAMA_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
}
# Short, and for messages whose content is a list of {"type": "text", "text": ...} and {"type": "image"}.
_CHAT_TEMPLATE = """\
{% for message in messages %}\
{{ '<|User|>: ' if message.role == 'user' else '<|Assistant|>: ' if message.role == 'assistant' else '' }}\
{% for part in message.content %}{{ '<image_placeholder>\\n' if part.type == 'image' else part.text }}{% endfor %}\
{{ '<｜end▁of▁sentence｜>' if message.role == 'assistant' else '\\n\\n' }}\
{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}
"""


def _write_json(path: Path, data: Any) -> None:
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


def _deepseek_config(model: Model) -> dict[str, Any]:
    """``config.json``: parts by the names of their variants, Llama's sizes only where they differ from the defaults."""
    s = model.sizes
    named = Sizes()
    vision: dict[str, Any] = {
        "image_size": s.image_size, "model_name": "siglip_large_patch16_384", "select_feature": "same",
        "select_layer": -1,
    }  # fmt: skip
    codec: dict[str, Any] = {"image_token_size": s.codebook_size, "n_embed": s.codebook_dim}
    if s.width != named.width:  # no variant has these sizes: written out
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
        params = {"depth": 2, "input_dim": inputs, "n_embed": s.hidden, "projector_type": "mlp_gelu"}
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
        **_llama_config(s), "attention_bias": False, "bos_token_id": ids(BOS), "eos_token_id": ids(EOS),
        "pad_token_id": ids(PAD), "head_dim": s.hidden // s.heads, "hidden_act": "silu", "mlp_bias": False,
        "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False, "use_cache": True,
    }  # fmt: skip
    vision = {
        "attention_bias": True, "depth": 2, "hidden_act": "gelu", "hidden_size": s.width, "image_size": s.image_size,
        "layer_norm_eps": 1e-6, "mlp_ratio": float(s.mlp_ratio), "model_type": "janus_vision_model",
        "num_attention_heads": s.vision_heads, "num_channels": 3, "num_hidden_layers": s.vision_layers,
        "num_image_tokens": s.grid**2, "patch_size": s.patch_size, "projection_dim": s.hidden, "use_qk_norm": False,
    }  # fmt: skip
    codec = {
        "base_channels": s.ch, "channel_multiplier": s.ch_mult, "double_latent": False, "dropout": 0.0,
        "embed_dim": s.codebook_dim, "hidden_act": "gelu", "image_token_embed_dim": s.hidden, "in_channels": 3,
        "latent_channels": s.z_channels, "model_type": "janus_vqgan", "num_embeddings": s.codebook_size,
        "num_hidden_layers": 2, "num_patches": s.grid, "num_res_blocks": s.num_res_blocks, "out_channels": 3,
        "projection_dim": s.hidden,
    }  # fmt: skip
    return {
        "architectures": ["JanusForConditionalGeneration"], "dtype": "bfloat16", "image_token_id": ids(IMAGE),
        "model_type": "janus", "text_config": text, "tie_word_embeddings": False, "transformers_version": "5.23.0",
        "vision_config": vision, "vq_config": codec,
    }  # fmt: skip


def _special_tokens(model: Model) -> list[str]:
    """In the order of their ids, which begin after the vocabulary."""
    image_tokens = [f"<image_token_{i}>" for i in range(model.sizes.grid**2)]
    between = [] if model.pro else [f"<filler_{model.entries + i}>" for i in range(2, 15)]
    placeholder = [IMAGE] if model.pro else []
    return [BOS, EOS, *between, PAD, IMAGE_START, *image_tokens, IMAGE_END, *placeholder, *_OTHER_SPECIAL]


def _write_tokenizer(path: Path, model: Model, layout: str) -> Callable[[str], int]:
    """A byte-level BPE trained on Python's own help texts, then entries that no text reaches; ids by spelling."""
    from pydoc_data.topics import topics

    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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
    trainer = trainers.BpeTrainer(vocab_size=model.merged, initial_alphabet=alphabet, show_progress=False)
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
        template = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A {BOS}:1 $B:1", special_tokens=[bos])
        tokenizer.post_processor = template
    tokenizer.save(str(path))
    return tokenizer.token_to_id


def _write_transformers_files(folder: Path, model: Model, ids: Callable[[str], int]) -> None:
    s = model.sizes
    generation = {
        "bos_token_id": ids(BOS), "eos_token_id": ids(EOS), "generation_kwargs": {"boi_token_id": ids(IMAGE_START)},
        "guidance_scale": 5, "pad_token_id": ids(PAD), "transformers_version": "5.23.0", "use_cache": True,
    }  # fmt: skip
    image = {
        "background_color": [127] * 3, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5] * 3, "image_processor_type": "JanusImageProcessor", "image_std": [0.5] * 3,
        "min_size": 14, "resample": 3, "rescale_factor": 1 / 255,
        "size": {"height": s.image_size, "width": s.image_size},
    }  # fmt: skip
    tokens = {"boi_token": IMAGE_START, "eoi_token": IMAGE_END, "image_token": IMAGE}
    tokenizer = {
        "backend": "tokenizers", **tokens, "bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": None,
        "clean_up_tokenization_spaces": False, "extra_special_tokens": [IMAGE, *_OTHER_SPECIAL],
        "model_max_length": 16384, "model_specific_special_tokens": tokens, "processor_class": "JanusProcessor",
        "tokenizer_class": "TokenizersBackend", "use_default_system_prompt": True,
    }  # fmt: skip
    processor = {
        "image_processor": image, "num_image_tokens": s.grid**2, "processor_class": "JanusProcessor",
        "use_default_system_prompt": True,
    }  # fmt: skip
    _write_json(folder / "config.json", _transformers_config(s, ids))
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "processor_config.json", processor)
    _write_json(folder / "tokenizer_config.json", tokenizer)
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def _write_deepseek_files(folder: Path, model: Model) -> None:
    preprocessor = {
        "background_color": [127] * 3, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_processor_type": "VLMImageProcessor", "image_size": model.sizes.image_size, "image_std": [0.5] * 3,
        "min_size": 14, "processor_class": "VLChatProcessor", "rescale_factor": 1 / 255,
    }  # fmt: skip
    processor = {
        "add_special_token": False, "ignore_id": -100, "image_tag": IMAGE, "mask_prompt": True,
        "num_image_tokens": model.sizes.grid**2, "processor_class": "VLChatProcessor",
        "sft_format": "deepseek" if model.pro else "deepseek_old",
    }  # fmt: skip
    spelled = {
        key: {"__type": "AddedToken", "content": text, "lstrip": False, "normalized": True, "rstrip": False,
              "single_word": False}
        for key, text in (("bos_token", BOS), ("eos_token", EOS))
    }  # fmt: skip
    tokenizer = {
        "add_bos_token": True, "add_eos_token": False, **spelled, "clean_up_tokenization_spaces": False,
        "legacy": True, "model_max_length": 16384, "pad_token": None, "sp_model_kwargs": {}, "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast", "use_default_system_prompt": True,
    }  # fmt: skip
    additional = [IMAGE, *_OTHER_SPECIAL] if model.pro else _OTHER_SPECIAL
    special = {"additional_special_tokens": additional, "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    _write_json(folder / "config.json", _deepseek_config(model))
    _write_json(folder / "preprocessor_config.json", preprocessor)
    _write_json(folder / "processor_config.json", processor)
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", tokenizer)


# ---- the folder ---------------------------------------------------------------------------------------------------


def checkpoint_tensors(model: str = "tiny", layout: str = "deepseek") -> list[Tensor]:
    """Every tensor that ``write_checkpoint`` writes for these two names.

    Raises:
        ValueError: there is no such model, or not in that layout.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    if layout not in MODELS[model].layouts:
        raise ValueError(f"layout of {model} must be {' or '.join(MODELS[model].layouts)}, got {layout!r}")
    tensors = transformers_tensors if layout == "transformers" else deepseek_tensors
    return list(tensors(MODELS[model].sizes))


def write_checkpoint(
    output: str | Path, model: str = "tiny", *, layout: str = "deepseek", seed: int = 0, progress: bool = False
) -> Path:
    """Write a model folder with random weights, whole or not at all.

    Args:
        output: the folder to make; it must not exist.
        model: "1b" (4.2 GB), "1.3b" (4.2 GB), "7b" (14.8 GB) or "tiny" (3 MB).
        layout: "deepseek", or "transformers" for "1b" and "tiny".
        seed: 0 or more; the same seed gives the same weights.
        progress: show a progress line on stderr.

    Raises:
        FileExistsError: ``output`` is there already.
        OSError: it cannot be written, or the disk has too little room.
        ValueError: there is no such model, or not in that layout; a negative seed.
    """
    from tqdm import tqdm

    tensors = checkpoint_tensors(model, layout)
    total = sum(t.bytes for t in tensors)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    output = Path(output).absolute()
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists: name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < total * 1.01:
        raise OSError(f"{output.parent} has {free / 1e9:.1f} GB left, and {model} takes {total / 1e9:.1f} GB")
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        ids = _write_tokenizer(partial / "tokenizer.json", MODELS[model], layout)
        if layout == "transformers":
            _write_transformers_files(partial, MODELS[model], ids)
        else:
            _write_deepseek_files(partial, MODELS[model])
        with tqdm(total=total, unit="B", unit_scale=True, desc=output.name, disable=not progress) as bar:
            _write_weights(partial, MODELS[model], layout, seed, bar.update)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return output


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--model", type=click.Choice(list(MODELS)), default="tiny", show_default=True, help="Whose sizes.")
@click.option("--layout", type=click.Choice(["deepseek", "transformers"]), default="deepseek", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(output: Path, model: str, layout: str, seed: int) -> None:
    """Write OUTPUT, a model folder in a published form with random weights (tiny 3 MB, 1b 4.2 GB, 7b 14.8 GB)."""
    try:
        click.echo(write_checkpoint(output, model, layout=layout, seed=seed, progress=True))
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
