"""What a PyTorch model folder holds, tensor by tensor, and what each becomes here.

Nothing is read but headers. ``plan_tensors`` pairs every parameter of the model with where its values lie, so that a
missing, surplus or misshaped tensor is named, with both shapes, before a byte of weights is touched.
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

# In every published file, and of no use to anyone.
_UNUSED = re.compile(
    r"vision_model\.vision_tower\.attn_pool\..+|gen_vision_model\.quantize\.codebook_used|.+\.rotary_emb\.inv_freq"
)

# transformers' names to DeepSeek's, in order; whatever no rule touches keeps its name.
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
    """Where one tensor lies in a file, unread."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def read(self) -> mx.array: ...


@dataclass(frozen=True)
class PlannedTensor:
    """One parameter of the model: its name and shape here, and the source tensors whose rows it is made of."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[SourceTensor, ...]

    @property
    def source_bytes(self) -> int:
        return sum(_bytes(source) for source in self.sources)

    @property
    def dtype(self) -> str:
        """The stored type, float64 as float32."""
        dtype = self.sources[0].dtype
        return "float32" if dtype == "float64" else dtype

    def read(self) -> mx.array:
        """The parameter in MLX's layout, in the type it was stored in (float64 as float32)."""
        parts = [source.read() for source in self.sources]
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)
        if array.ndim == 4:
            array = mx.contiguous(array.transpose(0, 2, 3, 1))  # OIHW to OHWI
        array = array.reshape(self.shape)
        if array.dtype == mx.float64:
            array = array.astype(mx.float32, stream=mx.cpu)
        mx.eval(array)
        return array


def _bytes(tensor: SourceTensor) -> int:
    size = {"bfloat16": 2, "float16": 2, "float64": 8}.get(tensor.dtype, 4)
    for n in tensor.shape:
        size *= n
    return size


def source_tensors(folder: Path) -> dict[str, SourceTensor]:
    """Every tensor of a model folder under its name in the file, unread.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor stands in two files or not where the index says.
    """
    tensors: dict[str, SourceTensor] = {}
    holder: dict[str, Path] = {}
    for path in weight_files(folder):
        found = read_torch_file(path) if path.suffix == ".bin" else read_safetensors_header(path)[0]
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(
                    f"{name} stands in {holder[name].name} and in {path}: the folder mixes two models"
                )
            tensors[name], holder[name] = tensor, path
    for index, _ in WEIGHT_FORMS:
        if (folder / index).exists():
            for name, file in read_index(folder / index).items():
                if name not in tensors:
                    raise CheckpointError(
                        f"{folder / file} lacks {name[:80]!r}, which {index} lists: download it again"
                    )
            break
    return tensors


def deepseek_name(name: str) -> str:
    """A tensor's name in DeepSeek's layout, given transformers' (q, k and v parts end in ``.qkv.q.weight``)."""
    for pattern, replacement in _RENAME_RULES:
        name = pattern.sub(replacement, name)
    match = re.fullmatch(
        r"(aligner|gen_aligner)\.(?:fc1|hidden_layers\.(\d+))\.(weight|bias)", name
    )
    if match:  # activations take every other place
        place = 0 if match[2] is None else 2 * (int(match[2]) + 1)
        name = f"{match[1]}.layers.{place}.{match[3]}"
    return name


def plan_tensors(
    tensors: Mapping[str, SourceTensor], config: JanusConfig, layout: Layout, folder: Path
) -> list[PlannedTensor]:
    """Pair every parameter of the model with its source, in the model's order.

    Raises:
        CheckpointError: tensors missing, left over, or of another shape or type than the config says.
    """
    rename = deepseek_name if layout == "transformers" else str
    found = {
        rename(name): tensor
        for name, tensor in tensors.items()
        if not _UNUSED.fullmatch(rename(name))
    }
    expected = {name: array.shape for name, array in tree_flatten(JanusModel(config).parameters())}
    embedding = "language_model.model.embed_tokens.weight"
    if (
        layout == "transformers" and embedding in found and _is_tied(folder)
    ):  # a tied head is not stored
        found.setdefault("language_model.lm_head.weight", found[embedding])

    planned, used = [], set()
    missing = []
    for name, shape in expected.items():
        keys = _source_keys(name, found)
        if not all(key in found for key in keys):
            missing.append(name)
            continue
        used.update(keys)
        planned.append(PlannedTensor(name, shape, tuple(found[key] for key in keys)))
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
    data = read_model_json(folder / "config.json")
    text = data.get("text_config")
    return bool(
        data.get(
            "tie_word_embeddings",
            text.get("tie_word_embeddings") if isinstance(text, dict) else False,
        )
    )


def _source_keys(name: str, found: Mapping[str, SourceTensor]) -> list[str]:
    fused = re.fullmatch(r"(.+\.attn\.qkv)\.(weight|bias)", name)
    if fused and name not in found:
        return [f"{fused[1]}.{part}.{fused[2]}" for part in "qkv"]
    return [name]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0][:100]!r}{more}"


def _check(tensor: PlannedTensor, folder: Path) -> None:
    rows, *rest = tensor.shape
    if len(rest) == 3:
        rest = [rest[2], rest[0], rest[1]]
    wanted = (rows, *rest)
    shapes = [source.shape for source in tensor.sources]
    got = shapes[0] if len(shapes) == 1 else (sum(s[0] for s in shapes if s), *shapes[0][1:])
    same_rows = all(s == shapes[0] for s in shapes)  # q, k and v are alike
    positions = tensor.name.endswith(".pos_embed") and (1, *got) == wanted
    if not same_rows or (got != wanted and not positions):
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
    """``source_tensors`` and ``plan_tensors`` of a folder."""
    try:
        return plan_tensors(source_tensors(folder), config, layout, folder)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
