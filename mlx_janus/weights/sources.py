"""From what a person names (a folder, a Hub id) to a converted folder, converting once into a cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import platformdirs

from ..config import MODEL_TYPE, JanusConfig, read_model_json
from ..errors import CheckpointError, ConfigError, HubError, OutputError
from . import hub
from .convert import ConvertOptions, Source, convert_checkpoint
from .folder import Progress, is_converted
from .footprint import check_memory
from .load import choose_dtype, with_bits
from .published import read_published_config, read_published_sizes
from .quantize import choose_rule
from .safetensors_files import weight_files

NO_MODEL = "name a model: a converted folder, a PyTorch model folder, or a Hub id such as deepseek-ai/Janus-Pro-1B"

TINY = Path(__file__).parent.parent / "assets" / "tiny"
"""Janus-Tiny, the model inside the package."""

SHORT_NAMES = {
    "janus-1.3b": "deepseek-ai/Janus-1.3B",
    "janus-pro-1b": "deepseek-ai/Janus-Pro-1B",
    "janus-pro-7b": "deepseek-ai/Janus-Pro-7B",
    "tiny": str(TINY),
}
"""What the published models, and the one in the package, are called for short; in any case of letters."""

_LAYOUT = 1  # of the weights: raised when conversions in the cache can no longer be read


def cache_folder() -> Path:
    """Where conversions made by ``load`` are kept: ``MLX_JANUS_CACHE``, else the platform's cache folder."""
    given = os.environ.get("MLX_JANUS_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("mlx_janus"))


def resolve(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The Hub id or folder that a short name stands for; another name, and that of a folder here, as it is."""
    known = SHORT_NAMES.get(os.fspath(name).lower())
    return name if known is None or _is_folder(Path(name)) else known


def find_source(name: str | os.PathLike[str], revision: str | None = None) -> Source:
    """The model folder behind a path or a Hub id, downloading what is needed.

    Raises:
        HubError, CheckpointError, ConfigError, UnsupportedModelError: it is nowhere, or not a Janus.
    """
    name = resolve(name)
    path = _expanded(name)
    if _is_folder(path):
        if revision is not None:
            raise HubError(f"{path} is a folder, which has no revisions: leave revision out")
        return Source(path, path.resolve().name)
    model = _find_on_hub(name, revision)
    _read_sizes(model)
    return Source(hub.fetch(model), model.repo_id, model.revision)


def find_converted(
    name: str | os.PathLike[str],
    *,
    bits: int | None = None,
    recipe: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    low_memory: bool = False,
    progress: Progress | None = None,
) -> Path:
    """A converted folder for what is named; a PyTorch source is converted into the cache the first time.

    A foreign model and one that does not fit in memory are refused before a download and before a conversion. In the
    cache, the time of a folder's ``config.json`` is that of its last use.

    Raises:
        OutOfMemoryError: it does not fit; and whatever ``find_source`` and ``convert_checkpoint`` raise.
    """
    name = resolve(name)
    options = ConvertOptions(bits=bits, recipe=recipe)
    path = _expanded(name)
    if _is_folder(path):
        source = find_source(name, revision)
        if is_converted(path):
            return path
        config = read_published_config(path)[0]
        files = [*weight_files(path), *path.glob("*.json")]
        facts: list[object] = [
            [f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(set(files))
        ]
        cached = _cached(str(path.resolve()), facts, options)
    else:
        model = _find_on_hub(name, revision)
        sizes = _read_sizes(model)
        if sizes is None:
            return hub.fetch(model)
        config, source = sizes, None
        cached = _cached(model.repo_id, [model.revision], options)
    wanted = with_bits(config, bits, path, recipe)
    check_memory(wanted, choose_dtype(config, dtype), os.fspath(name), low_memory=low_memory)
    if is_converted(cached):
        with contextlib.suppress(OSError):  # a cache may be read-only
            os.utime(cached / "config.json")
        return cached
    return _convert(
        source or Source(hub.fetch(model), model.repo_id, model.revision), cached, options, progress
    )


def _read_sizes(model: hub.HubModel) -> JanusConfig | None:
    """Sizes of a PyTorch model on the Hub, from its config alone; None for a converted one, other families refused."""
    path = hub.fetch_config(model)
    return (
        None
        if read_model_json(path).get("model_type") == MODEL_TYPE
        else read_published_sizes(path)[0]
    )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long for any folder
        return False


def _expanded(name: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111  pathlib's raises for the home of nobody


def _find_on_hub(name: str | os.PathLike[str], revision: str | None) -> hub.HubModel:
    text = os.fspath(name)
    if not hub.HUB_ID.fullmatch(text) or len(text) > 200 or Path(text).exists():
        what = (
            "is a file"
            if len(text) <= 200 and Path(text).is_file()
            else "is neither a folder nor a Hub id"
        )
        raise CheckpointError(f"{text[:200]} {what}: {NO_MODEL}")
    return hub.find(text, revision)


def _cached(source: str, facts: list[object], options: ConvertOptions) -> Path:
    """The folder of a conversion; a recipe counts by its name and by what it says now, which a release may change."""
    rule = choose_rule(options.bits, options.recipe)
    precision = [options.recipe, asdict(rule)] if rule and options.recipe else options.bits
    key = json.dumps([source, facts, precision, _LAYOUT])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    label = "--".join(
        Path(source).parts[-2:] if source.count("/") == 1 else Path(source).parts[-1:]
    )
    quantized = f"{options.recipe or f'{options.bits}bit'}-" if rule else ""
    return cache_folder() / f"{label}-{quantized}{digest}"


def _convert(
    source: Source, cached: Path, options: ConvertOptions, progress: Progress | None
) -> Path:
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{cached.parent} cannot be made ({error.strerror}): set MLX_JANUS_CACHE to a folder that can be written"
        ) from None
    try:
        convert_checkpoint(source, cached, options, progress)
    except OutputError:
        if not _is_complete(cached):  # another process may have made it meanwhile
            raise
    return cached


def _is_complete(folder: Path) -> bool:
    try:
        return is_converted(folder)
    except ConfigError:
        return False
