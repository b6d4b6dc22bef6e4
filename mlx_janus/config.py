"""Sizes and facts of a model as frozen dataclasses, and their form in ``config.json``.

Every size is written out: nothing here knows a named variant. Each part carries its ``kind``, so another encoder is
another dataclass in the union of its field in ``JanusConfig`` and another entry in a table of ``models/janus.py``.
Values are checked where they enter; a config that passes describes a model that can be built.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from .errors import ConfigError, UnsupportedModelError
from .limits import MAX_CFG_WEIGHT, MAX_TEMPERATURE

FORMAT_VERSION = 1
MODEL_TYPE = "mlx_janus"

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = typing.get_args(Dtype)

QuantizationMode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
"""How MLX packs weights: whole numbers with a scale and a bias a group, or small floats with a scale a group."""
Recipe = Literal["light", "balanced", "faithful", "mxfp4", "mxfp8", "nvfp4"]
RECIPES: tuple[str, ...] = typing.get_args(Recipe)
"""Named choices of bits, layer by layer; ``weights/quantize.py`` says which."""
BITS = (4, 8)
"""Bits of the language model that may be asked for."""
GROUP_SIZES = (32, 64, 128)
"""Weights that share one scale, as may be asked for with bits."""

_MAX_SIZE = 1 << 20  # far above any width or vocabulary, far below what would overflow
_MAX_DEPTH = 512

T = TypeVar("T")


def _size(default: Any = dataclasses.MISSING, *, low: int = 1, high: int = _MAX_SIZE) -> Any:
    """A whole number from low to high (for a tuple: each of its entries)."""
    return field(default=default, metadata={"low": low, "high": high})


def _number(default: Any = dataclasses.MISSING, *, low: float = 0.0, high: float = 1e9) -> Any:
    """A finite number from low to high."""
    return field(default=default, metadata={"low": low, "high": high})


_LATER = {"later": True}  # a field that the first releases did not write: left out where it is the default


@dataclass(frozen=True)
class Section:
    """One object of ``config.json``: checks its fields' types and ranges when made."""

    title: ClassVar[str] = "config"

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            self._check(f.name, value, hints[f.name], f.metadata)

    def _check(self, name: str, value: Any, hint: Any, limits: typing.Mapping[str, Any]) -> None:
        origin = typing.get_origin(hint)
        if origin in (types.UnionType, typing.Union):
            members = [h for h in typing.get_args(hint) if h is not type(None)]
            if value is not None and type(value) not in members:
                self._check(name, value, members[0], limits)
            return
        if origin is tuple:
            item_hints = typing.get_args(hint)
            fixed = None if item_hints[-1] is Ellipsis else len(item_hints)
            if not isinstance(value, tuple) or not value or (fixed is not None and len(value) != fixed):
                raise self.error(name, value, f"a list of {fixed or 'one or more'} values")
            for item in value:
                self._check(name, item, item_hints[0], limits)
            return
        if origin is Literal:
            if value not in typing.get_args(hint):
                raise self.error(name, value, " or ".join(map(repr, typing.get_args(hint))))
            return
        if hint is float and type(value) in (int, float):
            if not limits.get("low", -1e30) <= value <= limits.get("high", 1e30):
                raise self.error(name, value, f"a number from {limits['low']:g} to {limits['high']:g}")
            return
        if isinstance(hint, type) and (type(value) is not hint):
            raise self.error(name, value, f"a {hint.__name__}")
        if hint is int and limits and not limits["low"] <= value <= limits["high"]:
            raise self.error(name, value, f"a whole number from {limits['low']} to {limits['high']}")

    @classmethod
    def error(cls, name: str, value: Any, allowed: str) -> ConfigError:
        return ConfigError(f"{cls.title}: {name} must be {allowed}, got {_short(value)}")

    @classmethod
    def from_dict(cls: type[T], data: Any) -> T:
        """Build from parsed JSON. Unknown keys are refused: they would be sizes silently ignored."""
        title = getattr(cls, "title", cls.__name__)
        if not isinstance(data, dict):
            raise ConfigError(f"{title} must be a JSON object, got {_short(data)}")
        hints = typing.get_type_hints(cls)
        known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(data) - set(known)):
            raise ConfigError(f"{title} has an unknown entry {unknown[0]!r}: the folder is of a newer version?")
        for name, f in known.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and name not in data:
                raise ConfigError(f"{title} lacks {name!r}")
        return cls(**{name: _from_json(value, hints[name]) for name, value in data.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field written out but for those of ``_LATER`` at their defaults."""
        written = [f for f in fields(self) if "later" not in f.metadata or getattr(self, f.name) != f.default]
        return {f.name: _to_json(getattr(self, f.name)) for f in written}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _from_json(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _from_json(value, _member(typing.get_args(hint), value))
    if origin is tuple and isinstance(value, list):
        return tuple(_from_json(v, typing.get_args(hint)[0]) for v in value)
    if isinstance(hint, type) and issubclass(hint, Section):
        return hint.from_dict(value)
    return value


def _member(hints: tuple[Any, ...], value: Any) -> Any:
    """The member of a union that a value is of; sections are told apart by their ``kind``."""
    hints = tuple(h for h in hints if h is not type(None))
    kind = value.get("kind") if isinstance(value, dict) else None
    for hint in hints:
        if kind is not None and kind in typing.get_args(typing.get_type_hints(hint).get("kind")):
            return hint
    return hints[0]


def _to_json(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_to_json(v) for v in value]
    return value


@dataclass(frozen=True)
class SiglipConfig(Section):
    """SigLIP vision transformer: square pictures, square patches, no class token."""

    title: ClassVar[str] = "understanding"
    kind: Literal["siglip"]
    image_size: int = _size(high=8192)  # pixels on a side
    patch_size: int = _size(high=1024)
    width: int = _size()
    layers: int = _size(high=_MAX_DEPTH)
    heads: int = _size(high=4096)
    mlp_width: int = _size()
    layer_norm_eps: float = _number(1e-6, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise self.error("image_size", self.image_size, f"a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise self.error("width", self.width, f"a multiple of heads {self.heads}")

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Positions that one picture takes in the language model."""
        return self.grid**2


@dataclass(frozen=True)
class VQConfig(Section):
    """VQ-GAN codec: a grid of codebook indices for a picture, one downsampling between two levels."""

    title: ClassVar[str] = "generation"
    kind: Literal["vq"]
    codebook_size: int = _size()
    codebook_dim: int = _size(high=4096)
    ch: int = _size(high=8192)
    ch_mult: tuple[int, ...] = _size(high=64)
    num_res_blocks: int = _size(high=64)
    z_channels: int = _size(high=65536)
    norm_groups: int = _size(32, high=1024)
    norm_eps: float = _number(1e-6, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ch_mult) > 10:
            raise self.error("ch_mult", self.ch_mult, "at most 10 levels")
        if self.ch % self.norm_groups:
            raise self.error("ch", self.ch, f"a multiple of norm_groups {self.norm_groups}")

    @property
    def downsampling(self) -> int:
        """Pixels on a side for one token."""
        return int(2 ** (len(self.ch_mult) - 1))


@dataclass(frozen=True)
class MLPConfig(Section):
    """An adaptor: ``depth`` linear layers with exact GELU between them."""

    title: ClassVar[str] = "aligner"
    kind: Literal["mlp_gelu"]
    input_dim: int = _size()
    output_dim: int = _size()
    depth: int = _size(2, high=16)


@dataclass(frozen=True)
class GenHeadConfig(Section):
    """Hidden states to logits over image tokens: linear, exact GELU, linear."""

    title: ClassVar[str] = "gen_head"
    kind: Literal["vision_head"]
    input_dim: int = _size()
    hidden_dim: int = _size()
    output_dim: int = _size()


@dataclass(frozen=True)
class LlamaConfig(Section):
    """The language model, in the words of transformers' LlamaConfig. The head is never tied."""

    title: ClassVar[str] = "language"
    kind: Literal["llama"]
    vocab_size: int = _size(high=1 << 24)
    hidden_size: int = _size()
    intermediate_size: int = _size()
    num_hidden_layers: int = _size(high=_MAX_DEPTH)
    num_attention_heads: int = _size(high=4096)
    num_key_value_heads: int = _size(high=4096)
    head_dim: int = _size(high=8192)
    max_position_embeddings: int = _size(high=1 << 24)
    rms_norm_eps: float = _number(1e-6, high=1.0)
    rope_theta: float = _number(10000.0, low=1.0, high=1e12)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise self.error(
                "num_attention_heads", self.num_attention_heads, f"a multiple of {self.num_key_value_heads} kv heads"
            )
        if self.head_dim % 2:
            raise self.error("head_dim", self.head_dim, "even (rotary embeddings turn pairs)")


SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class PromptConfig(Section):
    """Roles, separators and the spellings of control tokens. Ids are looked up by spelling: they differ per model."""

    title: ClassVar[str] = "prompt"
    user: str = "<|User|>"
    assistant: str = "<|Assistant|>"
    system: str = SYSTEM_PROMPT  # of answering; drawing has none
    separator: str = "\n\n"
    bos: str = "<｜begin▁of▁sentence｜>"
    eos: str = "<｜end▁of▁sentence｜>"
    pad: str = "<｜▁pad▁｜>"
    image_start: str = "<begin_of_image>"
    image_end: str = "<end_of_image>"
    image: str = "<image_placeholder>"


@dataclass(frozen=True)
class ImageConfig(Section):
    """How a picture becomes the encoder's input."""

    title: ClassVar[str] = "image"
    image_size: int = _size(high=8192)
    min_size: int = _size(14, high=8192)
    background: tuple[int, int, int] = _size((127, 127, 127), low=0, high=255)
    mean: tuple[float, float, float] = _number((0.5, 0.5, 0.5), low=-10, high=10)
    std: tuple[float, float, float] = _number((0.5, 0.5, 0.5), low=1e-6, high=10)


@dataclass(frozen=True)
class DrawingConfig(Section):
    """Defaults of drawing: the model's own guidance and temperature."""

    title: ClassVar[str] = "drawing"
    cfg_weight: float = _number(5.0, high=MAX_CFG_WEIGHT)
    temperature: float = _number(1.0, high=MAX_TEMPERATURE)


@dataclass(frozen=True)
class LayerBits(Section):
    """One quantized layer."""

    title: ClassVar[str] = "quantization.layers"
    path: str
    bits: int = _size(low=1, high=8)
    group_size: int = _size(low=16, high=1024)
    mode: QuantizationMode = field(default="affine", metadata=_LATER)


@dataclass(frozen=True)
class QuantizationConfig(Section):
    """What was quantized, layer by layer, and which layers stayed float.

    ``bits`` and ``group_size`` are what was asked for, or what most layers of the language model get by the recipe.
    """

    title: ClassVar[str] = "quantization"
    layers: tuple[LayerBits, ...]
    bits: int = _size(low=1, high=8)
    group_size: int = _size(low=16, high=1024)
    kept_float: tuple[str, ...] | None = None
    recipe: Recipe | None = field(default=None, metadata=_LATER)

    @property
    def choice(self) -> str:
        """What was asked for: "4 bits", or "the recipe light"."""
        return f"the recipe {self.recipe}" if self.recipe else f"{self.bits} bits"


@dataclass(frozen=True)
class JanusConfig(Section):
    """A whole model. ``config.json`` of a converted folder is this plus ``model_type`` and ``format_version``."""

    title: ClassVar[str] = "config.json"
    understanding: SiglipConfig
    generation: VQConfig
    language: LlamaConfig
    aligner: MLPConfig
    gen_aligner: MLPConfig
    gen_head: GenHeadConfig
    image: ImageConfig
    prompt: PromptConfig = field(default_factory=PromptConfig)
    drawing: DrawingConfig = field(default_factory=DrawingConfig)
    dtype: Dtype = "bfloat16"
    quantization: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        hidden = self.language.hidden_size
        joints = [
            ("aligner.input_dim", self.aligner.input_dim, "the vision width", self.understanding.width),
            ("aligner.output_dim", self.aligner.output_dim, "the language hidden size", hidden),
            ("gen_aligner.output_dim", self.gen_aligner.output_dim, "the language hidden size", hidden),
            ("gen_head.input_dim", self.gen_head.input_dim, "the language hidden size", hidden),
            ("gen_head.output_dim", self.gen_head.output_dim, "the codebook size", self.generation.codebook_size),
            ("image.image_size", self.image.image_size, "the vision image size", self.understanding.image_size),
        ]
        for name, value, what, wanted in joints:
            if value != wanted:
                raise self.error(name, value, f"{what} {wanted}")
        if self.image_size % self.generation.downsampling:
            raise self.error("image_size", self.image_size, f"a multiple of {self.generation.downsampling}")

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels, read or drawn."""
        return self.understanding.image_size

    @property
    def grid(self) -> int:
        """Image tokens on a side of a drawn picture."""
        return self.image_size // self.generation.downsampling

    @property
    def image_tokens(self) -> int:
        """Tokens of a drawn picture."""
        return self.grid**2

    @classmethod
    def load(cls, path: Path) -> JanusConfig:
        """Read a converted folder's ``config.json``.

        Raises:
            ConfigError: not readable, no JSON, or sizes that no model can have.
            UnsupportedModelError: of a format version that this release does not read.
        """
        data = read_json(path)
        if data.pop("model_type", None) != MODEL_TYPE:
            raise UnsupportedModelError(f"{path} is no converted mlx_janus model")
        version = data.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise UnsupportedModelError(
                f"{path} has format version {_short(version)}, this release reads {FORMAT_VERSION}: convert again"
            )
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def dump(self, path: Path) -> None:
        """Write ``config.json``."""
        data = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **self.to_dict()}
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """A JSON object from a file of at most ``limit`` bytes.

    Raises:
        ConfigError: the file is missing, too large, no JSON, or no object.
    """
    try:
        if path.stat().st_size > limit:
            raise ConfigError(f"{path} is larger than {limit >> 20} MiB: it is no config file")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: download the whole model folder") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {_short(data)}")
    return data
