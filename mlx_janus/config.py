"""The config of a model: frozen dataclasses of its sizes, and their form in ``config.json``.

Every size is written out; there are no named variants. Each part has a ``kind``. A new encoder is
a new dataclass in the union of its field, and an entry in a table in ``models``. A new image
pathway is a new subclass of ``GenerationConfig``. Values are checked when a config is made, so
every config describes a model that can be built.
"""

from __future__ import annotations

import json
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from .errors import ConfigError, OptionError, UnsupportedModelError
from .files import POINTER_ADVICE
from .limits import MAX_CFG_WEIGHT, MAX_TEMPERATURE
from .sections import LATER, Fault, JsonError, Section, number_field, read_json, shorten, size_field

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Format versions that this release reads. Version 1 had several sections for the VQ pathway."""
CONVERTED_MODEL_TYPE = "mlx_janus"
"""Value of ``model_type`` in a converted folder's ``config.json``."""

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = typing.get_args(Dtype)

QuantizationMode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
"""MLX's quantization modes: integers with a scale and a bias per group, or floats with a scale."""
Recipe = Literal["light", "balanced", "faithful", "mxfp4", "mxfp8", "nvfp4"]
RECIPES: tuple[str, ...] = typing.get_args(Recipe)
"""Names of the quantization recipes in ``weights/quantize.py``."""
BITS = (4, 8)
"""Values of the option ``bits``: bits per weight of the language model."""
GROUP_SIZES = (32, 64, 128)
"""Values of the option ``group_size``: weights that share one scale."""
Roles = Literal["pro", "plain"]
ROLES: dict[Roles, tuple[str, str]] = {
    "pro": ("<|User|>", "<|Assistant|>"),
    "plain": ("User", "Assistant"),
}
"""Spellings of the user's and the assistant's role, by the value of the option ``roles``.

Janus-Pro was trained with the first pair, Janus-1.3B with the second.
"""

_MAX_DEPTH = 512  # layers
_MAX_SIDE = 8192  # pixels
_MAX_VOCABULARY = 1 << 24  # tokens
# The advice for each fault of a file, at the end of the error's message.
_ADVICE: dict[Fault, str] = {
    "missing": "download the whole model folder",
    "too large": "it is no config file",
    "pointer": POINTER_ADVICE,
    "invalid": "download it again",
}


@dataclass(frozen=True)
class SiglipConfig(Section):
    """SigLIP vision transformer: square images, square patches, no class token."""

    title: ClassVar[str] = "understanding"
    kind: Literal["siglip"]
    image_size: int = size_field(high=_MAX_SIDE)  # pixels per side
    patch_size: int = size_field(high=1024)  # pixels per side
    width: int = size_field()
    layers: int = size_field(high=_MAX_DEPTH)
    heads: int = size_field(high=4096)
    mlp_width: int = size_field()
    layer_norm_eps: float = number_field(1e-6, low=1e-12, high=1.0)
    # Mean and std by which the encoder normalizes its input once more; None: it does not.
    pixel_mean: tuple[float, float, float] | None = number_field(None, low=-10, later=True)
    pixel_std: tuple[float, float, float] | None = number_field(None, low=1e-6, later=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.pixel_mean is None) != (self.pixel_std is None):
            raise self.error("pixel_std", self.pixel_std, "given together with pixel_mean")
        if self.image_size % self.patch_size:
            raise self.error(
                "image_size", self.image_size, f"a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise self.error("width", self.width, f"a multiple of heads {self.heads}")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Positions of one image in the language model."""
        return self.grid**2


@dataclass(frozen=True)
class VQConfig(Section):
    """VQ-GAN codec: images as grids of codebook indices.

    ``ch_mult`` has one entry per level. Each level after the first halves the sides of an image.
    """

    title: ClassVar[str] = "generation.codec"
    kind: Literal["vq"]
    codebook_size: int = size_field()
    codebook_dim: int = size_field(high=4096)
    ch: int = size_field(high=_MAX_SIDE)  # base number of channels
    ch_mult: tuple[int, ...] = size_field(high=64)  # channels of each level, in units of ``ch``
    num_res_blocks: int = size_field(high=64)
    z_channels: int = size_field(high=65536)  # of latents, before projection to ``codebook_dim``
    norm_groups: int = size_field(32, high=1024)
    norm_eps: float = number_field(1e-6, low=1e-12, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ch_mult) > 10:
            raise self.error("ch_mult", self.ch_mult, "at most 10 levels")
        if self.ch % self.norm_groups:
            raise self.error("ch", self.ch, f"a multiple of norm_groups {self.norm_groups}")

    @property
    def downsampling(self) -> int:
        """Pixels per side of one token."""
        return int(2 ** (len(self.ch_mult) - 1))


@dataclass(frozen=True)
class MLPConfig(Section):
    """Adaptor: ``depth`` linear layers with exact GELU between them."""

    title: ClassVar[str] = "aligner"
    kind: Literal["mlp_gelu"]
    input_dim: int = size_field()
    output_dim: int = size_field()
    depth: int = size_field(2, high=16)


@dataclass(frozen=True)
class GenHeadConfig(Section):
    """Image head, from hidden states to logits over image tokens: linear, exact GELU, linear."""

    title: ClassVar[str] = "generation.head"
    kind: Literal["vision_head"]
    input_dim: int = size_field()
    hidden_dim: int = size_field()
    output_dim: int = size_field()


@dataclass(frozen=True)
class LlamaConfig(Section):
    """Language model, with field names of transformers' LlamaConfig.

    ``lm_head`` has its own weights: it never shares those of the token embeddings.
    """

    title: ClassVar[str] = "language"
    kind: Literal["llama"]
    vocab_size: int = size_field(high=_MAX_VOCABULARY)
    hidden_size: int = size_field()
    intermediate_size: int = size_field()
    num_hidden_layers: int = size_field(high=_MAX_DEPTH)
    num_attention_heads: int = size_field(high=4096)
    num_key_value_heads: int = size_field(high=4096)
    head_dim: int = size_field(high=_MAX_SIDE)
    max_position_embeddings: int = size_field(high=1 << 24)
    rms_norm_eps: float = number_field(1e-6, low=1e-12, high=1.0)
    rope_theta: float = number_field(10000.0, low=1.0, high=1e12)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise self.error(
                "num_attention_heads",
                self.num_attention_heads,
                f"a multiple of {self.num_key_value_heads} kv heads",
            )
        if self.head_dim % 2:
            raise self.error("head_dim", self.head_dim, "even (rotary embeddings turn pairs)")


SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)


def check_roles(roles: str | None) -> Roles | None:
    """Return the value of the option ``roles``, which may be None.

    Raises:
        OptionError: the value is not one of ``ROLES``.
    """
    if roles is None:
        return None
    for name in ROLES:
        if name == roles:
            return name
    raise OptionError(f"roles must be {' or '.join(map(repr, ROLES))}, got {shorten(roles)}")


@dataclass(frozen=True)
class PromptConfig(Section):
    """Roles, separators and spellings of control tokens. Their ids differ between models."""

    title: ClassVar[str] = "prompt"
    user: str = "<|User|>"
    assistant: str = "<|Assistant|>"
    system: str = SYSTEM_PROMPT  # for answers; prompts for images have none
    separator: str = "\n\n"
    bos: str = "<｜begin▁of▁sentence｜>"
    eos: str = "<｜end▁of▁sentence｜>"
    pad: str = "<｜▁pad▁｜>"
    image_start: str = "<begin_of_image>"
    image_end: str = "<end_of_image>"
    image: str = "<image_placeholder>"
    # Ids of tokens that end an answer, as eos does; None: only eos.
    stop_ids: tuple[int, ...] | None = size_field(None, low=0, high=_MAX_VOCABULARY, later=True)

    @property
    def roles(self) -> Roles | None:
        """The name of the pair of roles; None if it is not one of ``ROLES``."""
        for name, pair in ROLES.items():
            if pair == (self.user, self.assistant):
                return name
        return None

    def with_roles(self, roles: str | None) -> PromptConfig:
        """Return a config with another pair of roles, or this one if ``roles`` is None.

        Raises:
            OptionError: ``roles`` is not one of ``ROLES``.
        """
        name = check_roles(roles)
        if name is None:
            return self
        user, assistant = ROLES[name]
        return replace(self, user=user, assistant=assistant)


@dataclass(frozen=True)
class ImageConfig(Section):
    """Preprocessing of an image for the vision encoder."""

    title: ClassVar[str] = "image"
    image_size: int = size_field(high=_MAX_SIDE)
    min_size: int = size_field(14, high=_MAX_SIDE)  # pixels; least length of a resized side
    background: tuple[int, int, int] = size_field((127, 127, 127), low=0, high=255)
    mean: tuple[float, float, float] = number_field((0.5, 0.5, 0.5), low=-10, high=10)
    std: tuple[float, float, float] = number_field((0.5, 0.5, 0.5), low=1e-6, high=10)


@dataclass(frozen=True)
class GenerationConfig(Section):
    """Base class of image pathways. Each kind is a subclass with the sizes of its own parts."""

    title: ClassVar[str] = "generation"
    kind: str
    image_size: int  # pixels per side of a generated image

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.image_size <= _MAX_SIDE:
            raise self.error("image_size", self.image_size, f"a whole number from 1 to {_MAX_SIDE}")

    def check_against(self, language: LlamaConfig) -> None:
        """Refuse sizes that do not fit the language model.

        This base class accepts all sizes: subclasses check their own.

        Raises:
            ConfigError: a size does not fit; the message gives the right one.
        """


@dataclass(frozen=True)
class VQGenerationConfig(GenerationConfig):
    """VQ pathway: codec, adaptor and head of image tokens, default guidance and temperature."""

    kind: Literal["vq"]
    codec: VQConfig
    aligner: MLPConfig
    head: GenHeadConfig
    cfg_weight: float = number_field(5.0, high=MAX_CFG_WEIGHT)
    temperature: float = number_field(1.0, high=MAX_TEMPERATURE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head.output_dim != self.codec.codebook_size:
            raise self.error(
                "head.output_dim",
                self.head.output_dim,
                f"the codebook size {self.codec.codebook_size}",
            )
        if self.image_size % self.codec.downsampling:
            raise self.error(
                "image_size", self.image_size, f"a multiple of {self.codec.downsampling}"
            )

    def check_against(self, language: LlamaConfig) -> None:
        """Refuse an adaptor or a head whose width is not the language model's hidden size.

        Raises:
            ConfigError: a width does not fit; the message gives the right one.
        """
        hidden = language.hidden_size
        widths = {
            "aligner.output_dim": self.aligner.output_dim,
            "head.input_dim": self.head.input_dim,
        }
        for name, width in widths.items():
            if width != hidden:
                raise self.error(name, width, f"the language hidden size {hidden}")

    @property
    def grid(self) -> int:
        """Image tokens per side."""
        return self.image_size // self.codec.downsampling

    @property
    def tokens(self) -> int:
        """Image tokens per image."""
        return self.grid**2


@dataclass(frozen=True)
class LayerBits(Section):
    """Path, bits, group size, mode and scaling of a quantized layer."""

    title: ClassVar[str] = "quantization.layers"
    path: str
    bits: int = size_field(low=1, high=8)
    group_size: int = size_field(low=16, high=1024)
    mode: QuantizationMode = field(default="affine", metadata=LATER)  # written unless affine
    # Whether one more scale applies to all weights of the layer; written unless false.
    scaled: bool = field(default=False, metadata=LATER)


@dataclass(frozen=True)
class QuantizationConfig(Section):
    """The quantized layers, and the layers that stayed float.

    ``bits`` and ``group_size`` are the options of the conversion. With a recipe, they are the
    values of most layers of the language model.
    """

    title: ClassVar[str] = "quantization"
    layers: tuple[LayerBits, ...]
    bits: int = size_field(low=1, high=8)
    group_size: int = size_field(low=16, high=1024)
    kept_float: tuple[str, ...] | None = None  # layers whose shapes no group fits; None: none
    recipe: Recipe | None = field(default=None, metadata=LATER)  # written unless None

    @property
    def choice(self) -> str:
        """The quantization in words: "4 bits" or "the recipe light"."""
        return f"the recipe {self.recipe}" if self.recipe else f"{self.bits} bits"


@dataclass(frozen=True)
class JanusConfig(Section):
    """All sections of a model. ``config.json`` adds ``model_type`` and ``format_version``."""

    title: ClassVar[str] = "config.json"
    understanding: SiglipConfig
    aligner: MLPConfig
    language: LlamaConfig
    generation: GenerationConfig
    image: ImageConfig
    prompt: PromptConfig = field(default_factory=PromptConfig)
    dtype: Dtype = "bfloat16"
    quantization: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        hidden = self.language.hidden_size
        vision_width = self.understanding.width
        vision_size = self.understanding.image_size
        if self.aligner.input_dim != vision_width:
            raise self.error(
                "aligner.input_dim", self.aligner.input_dim, f"the vision width {vision_width}"
            )
        if self.aligner.output_dim != hidden:
            raise self.error(
                "aligner.output_dim", self.aligner.output_dim, f"the language hidden size {hidden}"
            )
        if self.image.image_size != vision_size:
            raise self.error(
                "image.image_size", self.image.image_size, f"the vision image size {vision_size}"
            )
        self.generation.check_against(self.language)

    @property
    def image_size(self) -> int:
        """Pixels per side of a generated image."""
        return self.generation.image_size

    @classmethod
    def load(cls, path: Path) -> JanusConfig:
        """Read a converted folder's ``config.json``.

        Raises:
            ConfigError: the file is missing, unreadable or not JSON, an entry is missing or
                unknown, or a value is not allowed.
            UnsupportedModelError: the model is not a converted one, or this release cannot read its
                format version.
        """
        data = read_model_json(path)
        if data.pop("model_type", None) != CONVERTED_MODEL_TYPE:
            raise UnsupportedModelError(f"{path} is no converted mlx_janus model")
        version = data.pop("format_version", None)
        # ``True in (1, 2)`` holds, so a bool needs a check of its own.
        if version not in READABLE_VERSIONS or isinstance(version, bool):
            raise UnsupportedModelError(
                f"{path} has format version {shorten(version)}, "
                f"this release reads {' and '.join(map(str, READABLE_VERSIONS))}: convert again"
            )
        try:
            return cls.from_dict(_upgrade_from_version_1(data) if version == 1 else data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def dump(self, path: Path) -> None:
        """Write the config as a converted folder's ``config.json``."""
        header = {"model_type": CONVERTED_MODEL_TYPE, "format_version": FORMAT_VERSION}
        data = header | self.to_dict()
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _upgrade_from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a version 1 ``config.json`` in the form of version 2.

    Version 1 has four sections for the VQ pathway: the codec (named ``generation``), the adaptor,
    the head, and the defaults of drawing. Version 2 has them in one section, ``generation``. Values
    are not checked here, since the constructors of the sections check them.

    Raises:
        ConfigError: a section is missing, or ``drawing`` has an unknown entry.
    """
    old_names = {"codec": "generation", "aligner": "gen_aligner", "head": "gen_head"}
    generation: dict[str, Any] = {"kind": "vq"}
    # In version 1, generated images have the size of those that the vision encoder reads.
    if isinstance(data.get("understanding"), dict):
        generation["image_size"] = data["understanding"].get("image_size")
    for new_name, old_name in old_names.items():
        if old_name not in data:
            raise ConfigError(f"config.json lacks {old_name!r}")
        generation[new_name] = data[old_name]
    drawing = data.get("drawing", {})  # may be absent
    if not isinstance(drawing, dict) or set(drawing) - {"cfg_weight", "temperature"}:
        raise ConfigError(
            f"drawing must hold only cfg_weight and temperature, got {shorten(drawing)}"
        )
    moved = (*old_names.values(), "drawing")
    kept = {name: section for name, section in data.items() if name not in moved}
    return kept | {"generation": generation | drawing}


def read_model_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model folder, such as ``config.json``.

    Raises:
        ConfigError: the file is missing, unreadable, too large, or does not hold a JSON object.
    """
    try:
        return read_json(path)
    except JsonError as error:
        raise ConfigError(error.advise(_ADVICE)) from None
