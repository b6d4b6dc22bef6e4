"""Finding a converted folder for a path, a Hub id or a short name, and caching conversions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import platformdirs

from ..config import CONVERTED_MODEL_TYPE, JanusConfig, read_model_json
from ..errors import CheckpointError, ConfigError, HubError, OutputError
from . import hub
from .convert import ConvertOptions, Source, convert_checkpoint
from .folder import Progress, is_converted
from .footprint import check_memory
from .load import choose_dtype, with_quantization
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


def resolve_short_name(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Replace a short name by its Hub id or folder, unless a folder with this name exists.

    Any other name is returned unchanged.
    """
    known = SHORT_NAMES.get(os.fspath(name).lower())
    return name if known is None or _is_folder(Path(name)) else known


def find_source(name: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Find the model folder of a path, a Hub id or a short name; download missing files.

    A local folder is not checked.

    Raises:
        HubError: the Hub has no such model or is out of reach, or the name is a local folder, which
            cannot have a ``revision``.
        CheckpointError: the name is no folder and no Hub id, or the model's files are incomplete.
        ConfigError, UnsupportedModelError: the Hub's model is not a Janus.
        OutputError: the download cannot be written.
    """
    name = resolve_short_name(name)
    path = _expand_user(name)
    if _is_folder(path):
        if revision is not None:
            raise HubError(f"{path} is a folder, which has no revisions: leave revision out")
        return Source(path, path.resolve().name)
    model = _find_on_hub(name, revision)
    _read_sizes(model)  # refuses a model of another family before its weights are downloaded
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
    """Return the converted folder of a model; convert a PyTorch model into the cache if needed.

    A model of another family, or one that does not fit in memory, is refused before its weights are
    downloaded or converted. ``dtype`` and ``low_memory`` only affect the memory check. A folder
    found in the cache gets the present time as the modification time of its ``config.json``, which
    records the last use.

    Raises:
        OutOfMemoryError: the model does not fit in memory.
        OptionError: ``bits``, ``recipe`` or ``dtype`` is not allowed.
        JanusError: as for ``find_source`` and ``convert_checkpoint``.
    """
    name = resolve_short_name(name)
    options = ConvertOptions(bits=bits, recipe=recipe)
    path = _expand_user(name)
    if _is_folder(path):
        source = find_source(name, revision)  # refuses a revision, as a folder has none
        if is_converted(path):
            return path
        config, _ = read_published_config(path)
        cached = _cache_path(str(path.resolve()), _fingerprint(path), options)
    else:
        model = _find_on_hub(name, revision)
        sizes = _read_sizes(model)
        if sizes is None:  # the model on the Hub is converted already
            return hub.fetch(model)
        config = sizes
        source = None  # not downloaded so far
        cached = _cache_path(model.repo_id, [model.revision], options)
    quantized = with_quantization(config, bits, path, recipe)
    check_memory(quantized, choose_dtype(config, dtype), os.fspath(name), low_memory=low_memory)
    if is_converted(cached):
        with contextlib.suppress(OSError):  # a cache may be read-only
            os.utime(cached / "config.json")
        return cached
    source = source or Source(hub.fetch(model), model.repo_id, model.revision)
    return _convert(source, cached, options, progress)


def _fingerprint(folder: Path) -> list[object]:
    """Return the name, size and modification time of each weight and JSON file of a PyTorch folder.

    A change of any of these files can change the result of a conversion.
    """
    files: list[object] = []
    for file in sorted({*weight_files(folder), *folder.glob("*.json")}):
        status = file.stat()
        files.append([file.name, status.st_size, status.st_mtime_ns])
    return files


def _read_sizes(model: hub.HubModel) -> JanusConfig | None:
    """Return the config of a PyTorch model on the Hub, or None if the model is a converted one.

    Only ``config.json`` is downloaded, so the prompts and the preprocessing are the defaults.

    Raises:
        UnsupportedModelError: the model is of another family.
    """
    path = hub.fetch_config(model)
    if read_model_json(path).get("model_type") == CONVERTED_MODEL_TYPE:
        return None
    config, _ = read_published_sizes(path)
    return config


def _is_folder(path: Path) -> bool:
    """Return whether a folder exists at a path, which may also be made from a Hub id."""
    try:
        return path.is_dir()
    except OSError:  # the name is too long for a folder
        return False


def _expand_user(name: str | os.PathLike[str]) -> Path:
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
    too_long = len(text) > 200  # some systems raise an error for such a path
    if too_long or not hub.HUB_ID.fullmatch(text) or Path(text).exists():
        is_file = not too_long and Path(text).is_file()
        problem = "is a file" if is_file else "is neither a folder nor a Hub id"
        raise CheckpointError(f"{text[:200]} {problem}: {NO_MODEL}")
    return hub.find(text, revision)


def _cache_path(source: str, fingerprint: list[object], options: ConvertOptions) -> Path:
    """Return the folder of a conversion in the cache, whether or not it exists.

    Its name ends in a hash of the arguments. So a source that has changed gets another folder, and
    is converted again.

    Args:
        source: Hub id, or path of the source folder.
        fingerprint: the source's commit, or the names, sizes and times of its files.
        options: bits or recipe of the conversion.
    """
    rule = choose_rule(options.bits, options.recipe)
    # Another release may have another rule for the same recipe, so the rule is hashed too.
    precision = [options.recipe, asdict(rule)] if rule and options.recipe else options.bits
    key = json.dumps([source, fingerprint, precision, _LAYOUT])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    parts_in_label = 2 if source.count("/") == 1 else 1  # owner and name, or a folder's name
    label = "--".join(Path(source).parts[-parts_in_label:])
    quantization = f"{options.recipe or f'{options.bits}bit'}-" if rule else ""
    return cache_folder() / f"{label}-{quantization}{digest}"


def _convert(
    source: Source, cached: Path, options: ConvertOptions, progress: Progress | None
) -> Path:
    """Convert a source into the cache folder ``cached``, and return that folder.

    If another process writes the same folder first, its result is used.

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
        if not _is_complete(cached):
            raise
    return cached


def _is_complete(folder: Path) -> bool:
    """Return whether a folder holds a converted model; False if its config cannot be read.

    Conversions appear complete or not at all, so its config is enough to know.
    """
    try:
        return is_converted(folder)
    except ConfigError:
        return False
