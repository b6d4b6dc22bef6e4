"""The tensors of a PyTorch model folder, paired with the model's parameters.

Planning reads only headers. ``plan_tensors`` pairs every parameter with its source tensors. Errors
name a missing, surplus or misshaped tensor, with both shapes, before any weights are read.
"""

from __future__ import annotations

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
from .published import Layout
from .safetensors_files import WEIGHT_FORMS, read_index, read_safetensors_header, weight_files
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
_RENAME_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _RENAMES]


class SourceTensor(Protocol):
    """A tensor in a file, described by its header."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""

    @property
    def dtype(self) -> str:
        """Type as stored, by MLX's name."""

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
        return sum(_bytes(source) for source in self.sources)

    @property
    def dtype(self) -> str:
        """The stored type of the first source; float32 for float64."""
        dtype = self.sources[0].dtype
        return "float32" if dtype == "float64" else dtype

    def read(self) -> mx.array:
        """Read the parameter in MLX's layout and the stored type; float64 becomes float32."""
        parts = [source.read() for source in self.sources]
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)
        if array.ndim == 4:
            array = mx.contiguous(array.transpose(0, 2, 3, 1))  # a convolution: OIHW to OHWI
        array = array.reshape(self.shape)  # may add the batch axis of position embeddings
        if array.dtype == mx.float64:  # on the CPU: Apple's GPUs have no float64
            array = array.astype(mx.float32, stream=mx.cpu)
        mx.eval(array)
        return array


def _bytes(tensor: SourceTensor) -> int:
    """Return the bytes of a stored float tensor; a value of any other type counts as 4 bytes."""
    size = {"bfloat16": 2, "float16": 2, "float64": 8}.get(tensor.dtype, 4)
    for n in tensor.shape:
        size *= n
    return size


def source_tensors(folder: Path) -> dict[str, SourceTensor]:
    """Return every tensor of a model folder by its name in the file. Reads only headers.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is in two files, or in the
            index but in no file.
        ConfigError: the index is not JSON.
    """
    tensors: dict[str, SourceTensor] = {}
    holder: dict[str, Path] = {}  # file of each tensor
    for path in weight_files(folder):
        found = read_torch_file(path) if path.suffix == ".bin" else read_safetensors_header(path)[0]
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(
                    f"{name} stands in {holder[name].name} and in {path}: "
                    "the folder mixes two models"
                )
            tensors[name] = tensor
            holder[name] = path
    _check_index(folder, tensors)
    return tensors


def _check_index(folder: Path, tensors: Mapping[str, SourceTensor]) -> None:
    """Check that a folder has every tensor that its index lists, if it has an index.

    Raises:
        CheckpointError: a tensor is missing, or the index is damaged.
        ConfigError: the index is not JSON.
    """
    for index, _ in WEIGHT_FORMS:
        if not (folder / index).exists():
            continue
        for name, file in read_index(folder / index).items():
            if name not in tensors:
                raise CheckpointError(
                    f"{folder / file} lacks {name[:80]!r}, which {index} lists: download it again"
                )
        return  # weights are read in one form, so the other form's index does not matter


def deepseek_name(name: str) -> str:
    """Turn transformers' name of a tensor into DeepSeek's.

    transformers stores q, k and v apart; the new names end in ``.qkv.q.weight`` and so on.
    """
    for pattern, replacement in _RENAME_RULES:
        name = pattern.sub(replacement, name)
    match = re.fullmatch(
        r"(aligner|gen_aligner)\.(?:fc1|hidden_layers\.(\d+))\.(weight|bias)", name
    )
    if match:
        # In DeepSeek's numbering, the activations between the linear layers count too.
        place = 0 if match[2] is None else 2 * (int(match[2]) + 1)
        name = f"{match[1]}.layers.{place}.{match[3]}"
    return name


def plan_tensors(
    tensors: Mapping[str, SourceTensor], config: JanusConfig, layout: Layout, folder: Path
) -> list[PlannedTensor]:
    """Pair every parameter of the model with its source, in the model's order.

    Args:
        tensors: source tensors by their names in the files.
        config: the model's sizes.
        layout: whose names the files use, DeepSeek's or transformers'.
        folder: the model folder, for errors and for transformers' ``config.json``.

    Raises:
        CheckpointError: a tensor is missing, surplus, not of the config's shape, or not of floats.
        ConfigError: ``config.json`` cannot be read; it is read only for transformers' layout.
    """
    rename = deepseek_name if layout == "transformers" else str  # ``str`` keeps a name
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in renamed.items() if not _UNUSED.fullmatch(name)}
    embedding = "language_model.model.embed_tokens.weight"
    if layout == "transformers" and embedding in found and _is_tied(folder):
        # transformers stores no tied head; this model has a separate one, read from the embedding.
        found.setdefault("language_model.lm_head.weight", found[embedding])

    planned: list[PlannedTensor] = []
    used: set[str] = set()
    missing: list[str] = []
    for name, array in tree_flatten(JanusModel(config).parameters()):
        keys = _source_keys(name, found)
        if not all(key in found for key in keys):
            missing.append(name)
            continue
        used.update(keys)
        planned.append(PlannedTensor(name, array.shape, tuple(found[key] for key in keys)))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {_some(missing)}: the files are incomplete or of another model"
        )
    if surplus := sorted(set(found) - used):
        raise CheckpointError(
            f"{folder} holds {_some(surplus)}, which no Janus has: the files are of another model"
        )
    for tensor in planned:
        _check(tensor, folder)
    return planned


def _is_tied(folder: Path) -> bool:
    """Return whether ``lm_head`` shares its weight with the embedding.

    In ``config.json``, the entry of the whole model takes precedence over the language model's.

    Raises:
        ConfigError: ``config.json`` cannot be read.
    """
    data = read_model_json(folder / "config.json")
    if "tie_word_embeddings" in data:
        return bool(data["tie_word_embeddings"])
    text = data.get("text_config")
    return isinstance(text, dict) and bool(text.get("tie_word_embeddings"))


def _source_keys(name: str, found: Mapping[str, SourceTensor]) -> list[str]:
    """Return the source names of a parameter: one, or three if q, k and v are stored apart."""
    fused = re.fullmatch(r"(.+\.attn\.qkv)\.(weight|bias)", name)
    if fused and name not in found:
        return [f"{fused[1]}.{part}.{fused[2]}" for part in "qkv"]
    return [name]


def _some(names: list[str]) -> str:
    """Return the first name, cut to 100 characters, and the number of the others."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0][:100]!r}{more}"


def _check(tensor: PlannedTensor, folder: Path) -> None:
    """Check the shape and type of a parameter's source tensors.

    Raises:
        CheckpointError: the shapes do not match the config, or a type is not a float.
    """
    rows, *rest = tensor.shape
    if len(rest) == 3:
        rest = [rest[2], rest[0], rest[1]]  # a convolution: OHWI to OIHW
    wanted = (rows, *rest)
    shapes = [source.shape for source in tensor.sources]
    # Joining q, k and v adds their rows. A scalar has no rows to add.
    got = shapes[0] if len(shapes) == 1 else (sum(s[0] for s in shapes if s), *shapes[0][1:])
    same_shapes = all(s == shapes[0] for s in shapes)  # of q, k and v
    # transformers stores position embeddings without the batch axis
    lacks_batch = tensor.name.endswith(".pos_embed") and (1, *got) == wanted
    if not same_shapes or (got != wanted and not lacks_batch):
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
    """Read the headers of a folder and pair every parameter with its source.

    Raises:
        CheckpointError: as for ``source_tensors`` and ``plan_tensors``; also for their
            ``ConfigError``.
    """
    try:
        return plan_tensors(source_tensors(folder), config, layout, folder)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
