"""Finding a converted folder for a path, a Hub id or a short name, and caching conversions."""

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

NO_MODEL = (
    "name a model: a converted folder, a PyTorch model folder, "
    "or a Hub id such as deepseek-ai/Janus-Pro-1B"
)

TINY = Path(__file__).parent.parent / "assets" / "tiny"
"""Janus-Tiny, the model inside the package."""

SHORT_NAMES = {
    "janus-1.3b": "deepseek-ai/Janus-1.3B",
    "janus-pro-1b": "deepseek-ai/Janus-Pro-1B",
    "janus-pro-7b": "deepseek-ai/Janus-Pro-7B",
    "tiny": str(TINY),
}
"""Short names of the published models and of Janus-Tiny, matched without regard to case."""

_LAYOUT = 1  # version of cached weights; raised when older ones can no longer be read


def cache_folder() -> Path:
    """Return the folder of cached conversions: ``MLX_JANUS_CACHE``, else the platform's default."""
    given = os.environ.get("MLX_JANUS_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("mlx_janus"))


def resolve(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Replace a short name by its Hub id or folder; keep an existing folder and any other name."""
    known = SHORT_NAMES.get(os.fspath(name).lower())
    return name if known is None or _is_folder(Path(name)) else known


def find_source(name: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Find the model folder of a path, a Hub id or a short name; download missing files.

    A local folder is returned unread.

    Raises:
        HubError: the Hub has no such model or is out of reach, or a folder is given a revision.
        CheckpointError: the name is no folder and no Hub id, or the model's files are incomplete.
        ConfigError, UnsupportedModelError: the Hub's model is not a Janus.
        OutputError: the download cannot be written.
    """
    name = resolve(name)
    path = _expanded(name)
    if _is_folder(path):
        if revision is not None:
            raise HubError(f"{path} is a folder, which has no revisions: leave revision out")
        return Source(path, path.resolve().name)
    model = _find_on_hub(name, revision)
    _read_sizes(model)  # refuses a model of another family before its download
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
    """Find a converted folder; convert a PyTorch source into the cache unless it is there.

    A model of another family, or one that does not fit in memory, is refused before it is
    downloaded or converted; ``dtype`` and ``low_memory`` matter only to this check. In the cache,
    the time of a folder's ``config.json`` is set to now: the last use of the folder.

    Raises:
        OutOfMemoryError: the model does not fit in memory.
        OptionError: ``bits``, ``recipe`` or ``dtype`` is not allowed.
        JanusError: as for ``find_source`` and ``convert_checkpoint``.
    """
    name = resolve(name)
    options = ConvertOptions(bits=bits, recipe=recipe)
    path = _expanded(name)
    if _is_folder(path):
        source = find_source(name, revision)  # refuses a revision of a folder
        if is_converted(path):
            return path
        config, _ = read_published_config(path)
        cached = _cached(str(path.resolve()), _file_facts(path), options)
    else:
        model = _find_on_hub(name, revision)
        sizes = _read_sizes(model)
        if sizes is None:  # a converted model
            return hub.fetch(model)
        config = sizes
        source = None
        cached = _cached(model.repo_id, [model.revision], options)
    wanted = with_bits(config, bits, path, recipe)
    check_memory(wanted, choose_dtype(config, dtype), os.fspath(name), low_memory=low_memory)
    if is_converted(cached):
        with contextlib.suppress(OSError):  # a cache may be read-only
            os.utime(cached / "config.json")
        return cached
    source = source or Source(hub.fetch(model), model.repo_id, model.revision)
    return _convert(source, cached, options, progress)


def _file_facts(folder: Path) -> list[object]:
    """Return the name, size and modification time of each weight and JSON file of a PyTorch folder.

    A conversion depends on these files.
    """
    facts: list[object] = []
    for file in sorted({*weight_files(folder), *folder.glob("*.json")}):
        status = file.stat()
        facts.append([file.name, status.st_size, status.st_mtime_ns])
    return facts


def _read_sizes(model: hub.HubModel) -> JanusConfig | None:
    """Read the sizes of a PyTorch model on the Hub from its config; None for a converted model.

    Raises:
        UnsupportedModelError: the model is of another family.
    """
    path = hub.fetch_config(model)
    if read_model_json(path).get("model_type") == MODEL_TYPE:
        return None
    config, _ = read_published_sizes(path)
    return config


def _is_folder(path: Path) -> bool:
    """Return whether a path, which may be any name, is an existing folder."""
    try:
        return path.is_dir()
    except OSError:  # a name too long for any folder
        return False


def _expanded(name: str | os.PathLike[str]) -> Path:
    """Replace a leading "~" with the home folder; keep the "~" of an unknown user."""
    # Path.expanduser would raise for an unknown user.
    return Path(os.path.expanduser(name))  # noqa: PTH111


def _find_on_hub(name: str | os.PathLike[str], revision: str | None) -> hub.HubModel:
    """Find a model on the Hub.

    Raises:
        CheckpointError: the name is no Hub id, or is an existing path.
        HubError: the Hub has no such model, or is out of reach.
    """
    text = os.fspath(name)
    too_long = len(text) > 200
    if too_long or not hub.HUB_ID.fullmatch(text) or Path(text).exists():
        is_file = not too_long and Path(text).is_file()
        problem = "is a file" if is_file else "is neither a folder nor a Hub id"
        raise CheckpointError(f"{text[:200]} {problem}: {NO_MODEL}")
    return hub.find(text, revision)


def _cached(source: str, facts: list[object], options: ConvertOptions) -> Path:
    """Return the folder of a conversion in the cache.

    The folder's name ends in a hash, so that a changed source or recipe is converted again. The
    hash covers a recipe's content too, as a release may change it.

    Args:
        source: Hub id, or path of the source folder.
        facts: the source's commit, or the names, sizes and times of its files.
        options: options of the conversion.
    """
    rule = choose_rule(options.bits, options.recipe)
    precision = [options.recipe, asdict(rule)] if rule and options.recipe else options.bits
    key = json.dumps([source, facts, precision, _LAYOUT])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    depth = 2 if source.count("/") == 1 else 1  # owner and name, or the name of a folder
    label = "--".join(Path(source).parts[-depth:])
    quantized = f"{options.recipe or f'{options.bits}bit'}-" if rule else ""
    return cache_folder() / f"{label}-{quantized}{digest}"


def _convert(
    source: Source, cached: Path, options: ConvertOptions, progress: Progress | None
) -> Path:
    """Convert a source into the cache folder ``cached``, and return that folder.

    If another process has written the folder first, its result is accepted.

    Raises:
        OutputError: the folder cannot be written.
        JanusError: as for ``convert_checkpoint``.
    """
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{cached.parent} cannot be made ({error.strerror}): "
            "set MLX_JANUS_CACHE to a folder that can be written"
        ) from None
    try:
        convert_checkpoint(source, cached, options, progress)
    except OutputError:
        if not _is_complete(cached):  # another process may have written it first
            raise
    return cached


def _is_complete(folder: Path) -> bool:
    """Return whether a folder is a converted one; False if its config cannot be read."""
    try:
        return is_converted(folder)
    except ConfigError:
        return False
