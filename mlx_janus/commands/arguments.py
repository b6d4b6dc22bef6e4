"""Arguments for the library's functions: frozen dataclasses made from click's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from .progress import byte_progress
from .runner import import_mlx
from .wording import flags_in_log_messages

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline


@dataclass(frozen=True)
class Arguments:
    """Keyword arguments of a library function. None selects the library's default."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make arguments from a command's options. Ignore options that are not fields."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in names})

    def keywords(self) -> dict[str, Any]:
        """Return the fields that are not None, by name, to be passed to the library function."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class LoadArguments(Arguments):
    """Arguments of ``mlx_janus.load``."""

    model: str | None = None  # path, Hub id or short name; None: Janus-Tiny
    bits: int | None = None
    recipe: str | None = None
    dtype: str | None = None
    revision: str | None = None
    low_memory: bool = False
    roles: str | None = None


@dataclass(frozen=True)
class TextArguments(Arguments):
    """Arguments of ``JanusPipeline.generate_text``."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    system: str | None = None
    lookup: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class ImageArguments(Arguments):
    """Arguments of ``JanusPipeline.generate_images``."""

    seed: int | None = None
    cfg_weight: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    exact: bool | None = None
    window: int | None = None


def load_pipeline(arguments: LoadArguments) -> JanusPipeline:
    """Call ``mlx_janus.load`` with a progress bar for downloads and conversion."""
    import_mlx()
    from ..pipeline import load

    options = arguments.keywords()
    model = options.pop("model", None)  # passed by position: ``load`` calls it path_or_hub_id
    with byte_progress() as progress, flags_in_log_messages():
        return load(model, progress=progress, **options)
