"""The tensors of a PyTorch model folder, paired with the model's parameters.

``plan_tensors`` pairs every parameter with its source tensors, from the headers of the files. So an
error about a missing, surplus or misshaped tensor comes before any weights are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import JanusConfig, read_model_json
from ..errors import CheckpointError, ConfigError
from ..models.janus import JanusModel
from .published_values import Layout
from .safetensors_files import find_weights, read_index, read_safetensors_header
from .torch_files import read_torch_file

_FLOATS = ("bfloat16", "float16", "float32", "float64")

# Tensors of the published files that the model does not use.
_UNUSED = re.compile(
    r"vision_model\.vision_tower\.attn_pool\..+"
    r"|gen_vision_model\.quantize\.codebook_used"
    r"|.+\.rotary_emb\.inv_freq"
)

# Rules from transformers' names to DeepSeek's, applied in order.
_RENAMES = [
    (
        r"^model\.vision_model\.embeddings\.patch_embedding\.",
        "vision_model.vision_tower.patch_embed.proj.",
    ),
    (
        r"^model\.vision_model\.embeddings\.position_embedding\.weight$",
        "vision_model.vision_tower.pos_embed",
    ),
    (r"^model\.vision_model\.encoder\.layers\.", "vision_model.vision_tower.blocks."),
    (r"^model\.vision_model\.post_layernorm\.", "vision_model.vision_tower.norm."),
    (r"^(vision_model\..+)\.layer_norm([12])\.", r"\1.norm\2."),
    (r"^(vision_model\..+)\.self_attn\.projection_layer\.", r"\1.attn.proj."),
    (r"^(vision_model\..+)\.self_attn\.([qkv])_proj\.", r"\1.attn.qkv.\2."),
    (r"^model\.aligner\.", "aligner."),
    (r"^model\.generation_aligner\.", "gen_aligner."),
    (r"^model\.generation_embeddings\.", "gen_embed."),
    (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^model\.generation_head\.vision_head\.", "gen_head.vision_head."),
    (r"^model\.vqmodel\.", "gen_vision_model."),
    (r"^(gen_vision_model\.(?:en|de)coder)\.(?:up|down)\.", r"\1.conv_blocks."),
    (r"^(gen_vision_model\..+conv_blocks\.\d+)\.block\.", r"\1.res."),
    (r"^(gen_vision_model\..+mid)\.block_1\.", r"\1.0."),
    (r"^(gen_vision_model\..+mid)\.attn_1\.", r"\1.1."),
    (r"^(gen_vision_model\..+mid)\.block_2\.", r"\1.2."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
]
_TIED = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
"""The two names of one weight, where the head is tied to the embedding."""

_RENAME_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _RENAMES]


class SourceTensor(Protocol):
    """A tensor in a file; only ``read`` reads its values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""

    @property
    def dtype(self) -> str:
        """Type as stored, by MLX's name."""

    @property
    def path(self) -> Path:
        """The file."""

    def read(self) -> mx.array:
        """Read the values."""


@dataclass(frozen=True)
class PlannedTensor:
    """A parameter of the model and its source: one tensor, or several joined along the rows."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[SourceTensor, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes of the source tensors."""
        return sum(_stored_bytes(source) for source in self.sources)

    @property
    def dtype(self) -> str:
        """The stored type of the first source; float32 for float64."""
        dtype = self.sources[0].dtype
        return "float32" if dtype == "float64" else dtype

    def read(self) -> mx.array:
        """Read the parameter, in MLX's layout and the type of ``dtype``."""
        parts = [source.read() for source in self.sources]
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)
        if array.ndim == 4:
            array = mx.contiguous(array.transpose(0, 2, 3, 1))  # a convolution: OIHW to OHWI
        array = array.reshape(self.shape)  # position embeddings may lack the batch axis
        if array.dtype == mx.float64:
            # Apple's GPUs have no float64, so the CPU converts it.
            array = array.astype(mx.float32, stream=mx.cpu)
        mx.eval(array)
        return array


def _stored_bytes(tensor: SourceTensor) -> int:
    """Return the bytes of a tensor in its file.

    Items of an unknown type count as 4 bytes. ``plan_tensors`` refuses such tensors.
    """
    item_bytes = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}.get(tensor.dtype, 4)
    return math.prod(tensor.shape) * item_bytes


def source_tensors(folder: Path) -> dict[str, SourceTensor]:
    """Return every tensor of a model folder by its stored name.

    Only headers are read, except for a tensor that is in two files: its values are compared.

    Raises:
        CheckpointError: a file is missing or damaged, two files have different tensors of one name,
            or the index lists a tensor that no file has.
        ConfigError: the index is not JSON.
    """
    weights = find_weights(folder)
    tensors: dict[str, SourceTensor] = {}
    for path in weights.files:
        entries: Mapping[str, SourceTensor]  # the tensors of this file
        if path.suffix == ".bin":
            entries = read_torch_file(path)
        else:
            entries, _ = read_safetensors_header(path)
        for name, tensor in entries.items():
            if name in tensors and not _are_equal(tensors[name], tensor):
                raise CheckpointError(
                    f"{name[:100]} stands in {tensors[name].path.name} and, with other values, in "
                    f"{path}: the folder mixes two models"
                )
            tensors[name] = tensor
    if weights.index:
        _check_index(weights.index, tensors)
    return tensors


def _are_equal(a: SourceTensor, b: SourceTensor) -> bool:
    """Return whether two stored tensors have the same shape, type and bits.

    A tensor whose items share memory can be larger than its file. It counts as different, because
    reading it could take any amount of memory.

    Raises:
        CheckpointError: a file is missing, unreadable or cut short, or its type is not supported.
    """
    if a.shape != b.shape or a.dtype != b.dtype or _stored_bytes(b) > b.path.stat().st_size:
        return False
    return same_bits(a.read(), b.read())


def same_bits(a: mx.array, b: mx.array) -> bool:
    """Return whether two arrays have the same shape, type and bits.

    Their bits are compared as integers, since a NaN does not equal itself.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer_type = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[a.dtype.size]
    return bool(mx.array_equal(a.view(integer_type), b.view(integer_type)).item())


def _check_index(index: Path, tensors: Mapping[str, SourceTensor]) -> None:
    """Check that the files of an index have every tensor that it lists.

    Args:
        index: the path of the index.
        tensors: the tensors of its weight files, by name.

    Raises:
        CheckpointError: a tensor is missing, or the index is damaged.
        ConfigError: the index is not JSON.
    """
    for name, file in read_index(index).items():
        if name not in tensors:
            raise CheckpointError(
                f"{index.parent / file} lacks {name[:80]!r}, which {index.name} lists: "
                "download it again"
            )


def deepseek_name(name: str) -> str:
    """Turn transformers' name of a tensor into DeepSeek's.

    DeepSeek joins q, k and v into one tensor, ``qkv``, and transformers does not. The names
    returned for them end in ``.qkv.q.weight`` and so on.
    """
    for pattern, replacement in _RENAME_RULES:
        name = pattern.sub(replacement, name)
    match = re.fullmatch(
        r"(?P<aligner>aligner|gen_aligner)\.(fc1|hidden_layers\.(?P<hidden>\d+))\."
        r"(?P<leaf>weight|bias)",
        name,
    )
    if match:
        # fc1 is linear layer 0 and hidden_layers.0 is linear layer 1. DeepSeek's numbers also count
        # the activations between the linear layers, so these are 0 and 2.
        linear = 0 if match["hidden"] is None else int(match["hidden"]) + 1
        name = f"{match['aligner']}.layers.{2 * linear}.{match['leaf']}"
    return name


def plan_tensors(
    tensors: Mapping[str, SourceTensor], config: JanusConfig, layout: Layout, folder: Path
) -> list[PlannedTensor]:
    """Pair every parameter of the model with its source tensors, in the model's order.

    Args:
        tensors: source tensors by their stored names.
        config: the model's sizes.
        layout: whose names the files use, DeepSeek's or transformers'.
        folder: the model folder, for errors and for its ``config.json``.

    Raises:
        CheckpointError: a tensor is missing, surplus, not of the config's shape, or not of floats;
            or two tensors of one name differ.
        ConfigError: ``config.json`` cannot be read.
    """
    found = _renamed(tensors, layout, folder)
    if _is_tied(folder):
        # Most files store a tied weight once, as the embedding, and some as the head. The model has
        # both parameters, so the absent one gets the source of the other.
        for stored, absent in (_TIED, _TIED[::-1]):
            if stored in found:
                found.setdefault(absent, found[stored])

    planned: list[PlannedTensor] = []
    used: set[str] = set()
    missing: list[str] = []
    for name, parameter in tree_flatten(JanusModel(config).parameters()):
        source_names = _source_names(name, found)
        if not all(source in found for source in source_names):
            missing.append(name)
            continue
        used.update(source_names)
        sources = tuple(found[source] for source in source_names)
        planned.append(PlannedTensor(name, parameter.shape, sources))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {_shown(missing)}: the files are incomplete or of another model"
        )
    if surplus := sorted(set(found) - used):
        raise CheckpointError(
            f"{folder} holds {_shown(surplus)}, which no Janus has: the files are of another model"
        )
    for tensor in planned:
        _check_sources(tensor, folder)
    return planned


def _renamed(
    tensors: Mapping[str, SourceTensor], layout: Layout, folder: Path
) -> dict[str, SourceTensor]:
    """Return source tensors by DeepSeek's names, without those that the model does not use.

    Args:
        tensors: source tensors by their stored names.
        layout: whose names these are, DeepSeek's or transformers'.
        folder: the model folder, for the error.

    Raises:
        CheckpointError: two tensors with different values get one name.
    """
    if layout == "deepseek":
        return {name: t for name, t in tensors.items() if not _UNUSED.fullmatch(name)}
    found: dict[str, SourceTensor] = {}
    for stored_name, tensor in tensors.items():
        name = deepseek_name(stored_name)
        if _UNUSED.fullmatch(name):
            continue
        if name in found and not _are_equal(found[name], tensor):
            raise CheckpointError(
                f"{folder} holds {name[:100]!r} under two names and with two values: "
                "the folder mixes two models"
            )
        found[name] = tensor
    return found


def _is_tied(folder: Path) -> bool:
    """Return whether ``lm_head`` shares its weight with the embedding, as ``config.json`` says.

    The first of these that has ``tie_word_embeddings`` counts: ``language_config`` (DeepSeek), the
    entire config, ``text_config`` (transformers). Without any, the answer is False.

    Raises:
        ConfigError: ``config.json`` cannot be read.
    """
    data = read_model_json(folder / "config.json")
    for section in (data.get("language_config"), data, data.get("text_config")):
        if isinstance(section, dict) and section.get("tie_word_embeddings") is not None:
            return bool(section["tie_word_embeddings"])
    return False


def _source_names(name: str, found: Mapping[str, SourceTensor]) -> list[str]:
    """Return the names of a parameter's source tensors: one, or three if q, k and v are separate.

    Args:
        name: the parameter's name.
        found: source tensors by DeepSeek's names.
    """
    fused = re.fullmatch(r"(?P<layer>.+\.attn\.qkv)\.(?P<leaf>weight|bias)", name)
    if fused and name not in found:
        return [f"{fused['layer']}.{part}.{fused['leaf']}" for part in "qkv"]
    return [name]


def _shown(names: list[str]) -> str:
    """Return names as a message shows them: "'first' and 2 more", cut to 100 characters."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0][:100]!r}{more}"


def _check_sources(tensor: PlannedTensor, folder: Path) -> None:
    """Check the shape and type of a parameter's source tensors.

    Raises:
        CheckpointError: the shapes do not match the config, or a type is not a float.
    """
    wanted = tensor.shape  # below: as the files store it
    if len(wanted) == 4:
        out_channels, height, width, in_channels = wanted
        wanted = (out_channels, in_channels, height, width)  # stored convolutions are OIHW
    shapes = [source.shape for source in tensor.sources]
    got = shapes[0]
    if len(shapes) > 1:
        # q, k and v are joined along the rows. A scalar has no rows and is refused below.
        rows = sum(shape[0] for shape in shapes if shape)
        got = (rows, *shapes[0][1:])
    same_shapes = all(shape == shapes[0] for shape in shapes)
    # transformers stores position embeddings without the batch axis.
    lacks_batch = tensor.name.endswith(".pos_embed") and (1, *got) == wanted
    if not same_shapes or (got != wanted and not lacks_batch):
        if len(wanted) == 4 and got == tensor.shape:
            raise CheckpointError(
                f"{folder}: {tensor.name} is in MLX's layout already: another program has "
                "converted the folder, take the original model"
            )
        raise CheckpointError(
            f"{folder}: {tensor.name} has the shape {list(got)}, config.json says {list(wanted)}: "
            "they do not belong together"
        )
    for source in tensor.sources:
        if source.dtype not in _FLOATS:
            raise CheckpointError(
                f"{folder}: {tensor.name} is stored as {source.dtype}; only float weights are read"
            )


def read_plan(folder: Path, config: JanusConfig, layout: Layout) -> list[PlannedTensor]:
    """Read the headers of a model folder and pair every parameter with its source tensors.

    Raises:
        CheckpointError: a file is missing or damaged, or its tensors do not fit the config. The
            ``ConfigError`` of an index or ``config.json`` becomes a ``CheckpointError`` too.
    """
    try:
        return plan_tensors(source_tensors(folder), config, layout, folder)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
