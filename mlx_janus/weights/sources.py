"""Finding a converted folder for a model's name; a PyTorch model is converted into the cache once.

``names.py`` understands the name, ``hub.py`` downloads, and ``conversions.py`` knows the cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ..config import CONVERTED_MODEL_TYPE, JanusConfig, read_model_json
from ..errors import ConfigError, OutputError
from ..files import MAX_JSON_FILE, read_bounded
from ..processing.tokenizer import TOKENIZER_FILE, prepare_tokenizer
from . import hub
from .addresses import NO_MODEL
from .conversions import (
    CachedWeights,
    SourceState,
    cache_folder,
    conversions_like,
    find_conversion,
    record_source,
    reuse_weights,
    weight_hashes,
)
from .convert import ConvertOptions, Source, convert_checkpoint, plan_conversion
from .folder import Progress, is_converted, source_hashes
from .footprint import check_memory
from .load import choose_dtype, with_quantization
from .names import SHORT_NAMES, TINY, ModelName, resolve_short_name, understand_name
from .published import read_published, read_published_sizes
from .safetensors_files import weight_files

__all__ = [
    "NO_MODEL",
    "SHORT_NAMES",
    "TINY",
    "cache_folder",
    "find_converted",
    "find_source",
    "resolve_short_name",
    "understand_name",
]

_LOG = logging.getLogger("mlx_janus")


def find_source(name: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Find the model folder of a name that ``understand_name`` knows; download missing files.

    A local folder is not checked.

    Raises:
        HubError: the Hub has no such model or is out of reach, or the name is a local folder, which
            cannot have a ``revision``.
        OptionError: the name has another revision than ``revision``.
        CheckpointError: the name is no folder and no Hub id, or the model's files are incomplete.
        ConfigError, UnsupportedModelError: the Hub's model is not a Janus.
        OutputError: the download cannot be written.
    """
    found = understand_name(name, revision)
    if found.folder is not None:
        return _local_source(found, found.folder)
    model = _find_on_hub(found)
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
    downloaded or converted. Weights are not converted again if the cache has them, even if the
    source was moved or its other files have changed. ``dtype`` and ``low_memory`` only affect the
    memory check. To record the use of a folder in the cache, the modification time of its
    ``config.json`` is set to now.

    Raises:
        OutOfMemoryError: the model does not fit in memory.
        OptionError: ``bits``, ``recipe`` or ``dtype`` is not allowed.
        JanusError: as for ``find_source`` and ``convert_checkpoint``.
    """
    found = understand_name(name, revision)
    options = ConvertOptions(bits=bits, recipe=recipe)
    place, config, added_tokens = _find_place(found)
    if config is None:  # the model is converted already
        return place.folder if isinstance(place, Source) else hub.fetch(place)
    if isinstance(place, Source):
        state = _state_of_folder(place, config, added_tokens, options)
    else:
        state = _state_on_hub(place, found.revision, options)
    quantized = with_quantization(config, bits, Path(found.shown), recipe)
    check_memory(quantized, choose_dtype(config, dtype), found.shown, low_memory=low_memory)
    if cached := find_conversion(state):
        if isinstance(place, hub.HubModel):
            hub.record_branch(place)
        return cached
    _make_cache_folder(state.folder.parent)
    try:
        return _convert_or_reuse(place, quantized, state, progress)
    except OutputError:
        # Another process may have written the same folder first. Then that folder is used.
        if not _is_complete(state.folder):
            raise
        return state.folder


def _find_place(
    found: ModelName,
) -> tuple[hub.HubModel | Source, JanusConfig | None, tuple[str, ...]]:
    """Find the folder of a model, or its files on the Hub, and read its config.

    On the Hub, only ``config.json`` is read.

    Returns:
        The folder, or the model on the Hub; its config, or None if the model is a converted one;
        and the special tokens that a folder's files name, () for a model on the Hub.

    Raises:
        ConfigError, UnsupportedModelError: the config cannot be used.
        HubError: the Hub has no such model, or is out of reach.
        OutputError: the download cannot be written.
    """
    if found.folder is None:
        model = _find_on_hub(found)
        return model, _read_sizes(model), ()
    source = _local_source(found, found.folder)
    if is_converted(found.folder):
        return source, None, ()
    published = read_published(found.folder)
    return source, published.config, published.added_tokens


def _local_source(found: ModelName, folder: Path) -> Source:
    """Return the source in a folder on this machine. Log the folder if its name is not shown."""
    if found.shown != folder.resolve().name:
        _LOG.info("%s is taken from %s", found.shown, folder)
    return Source(folder, found.shown, found.revision or "")


def _state_of_folder(
    source: Source, config: JanusConfig, added_tokens: Sequence[str], options: ConvertOptions
) -> SourceState:
    """Return the state of a PyTorch folder.

    The facts are the config that conversion reads from the JSON files, the hash of the tokenizer,
    and the name, size and modification time of each weight file. So a file that conversion does not
    read has no effect, and neither has the white space in a JSON file.
    """
    files: list[object] = []
    for file in weight_files(source.folder):
        status = file.stat()
        files.append([file.name, status.st_size, status.st_mtime_ns])
    try:
        tokenizer = read_bounded(source.folder / TOKENIZER_FILE, MAX_JSON_FILE)
    except OSError:
        tokenizer = b""  # the conversion reports it
    tokens = (hashlib.sha256(tokenizer).hexdigest(), *added_tokens)
    facts = (config.to_dict(), tokens, files)
    path = str(source.folder.resolve())
    branch = ""  # a folder has none
    return SourceState(path, branch, source.name, source.revision, facts, options)


def _state_on_hub(
    model: hub.HubModel, revision: str | None, options: ConvertOptions
) -> SourceState:
    """Return the state of a model on the Hub, which is its commit.

    Args:
        model: the model.
        revision: the requested branch, tag or commit; None: the branch main.
        options: bits or recipe of the conversion.
    """
    branch = revision or "main"
    commit = model.revision
    return SourceState(model.repo_id, branch, model.repo_id, commit, (commit,), options)


def _read_sizes(model: hub.HubModel) -> JanusConfig | None:
    """Return the config of a PyTorch model on the Hub, or None if the model is a converted one.

    Only ``config.json`` is downloaded, so the prompts and the preprocessing are the defaults.

    Raises:
        ConfigError, UnsupportedModelError: the config cannot be used.
        HubError, OutputError: the config cannot be downloaded.
    """
    path = hub.fetch_config(model)
    if read_model_json(path).get("model_type") == CONVERTED_MODEL_TYPE:
        return None
    config, _ = read_published_sizes(path)
    return config


def _find_on_hub(found: ModelName) -> hub.HubModel:
    """Find a model on the Hub.

    Raises:
        HubError: the Hub has no such model, or is out of reach.
    """
    # A name that is no folder is looked up too, so that the error says how a Hub id reads.
    return hub.find(found.repo_id or found.shown, found.revision)


def _make_cache_folder(folder: Path) -> None:
    """Make the folder of the cache, unless it exists.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made ({error.strerror}): "
            "set MLX_JANUS_CACHE to a folder that can be written"
        ) from None


def _convert_or_reuse(
    place: hub.HubModel | Source,
    config: JanusConfig,
    state: SourceState,
    progress: Progress | None,
) -> Path:
    """Convert a source into the cache, or reuse weights in the cache; return the folder.

    Args:
        place: the folder of the source, or its model on the Hub, which is downloaded if needed.
        config: the config with the quantization; its prompt and preprocessing are not used.
        state: the source's state.
        progress: called during the hashing and the conversion; None: report nothing.

    Raises:
        OutputError: the folder cannot be written.
        JanusError: as for ``find_source`` and ``convert_checkpoint``.
    """
    candidates = conversions_like(config)
    if isinstance(place, Source):
        source = place
    else:
        reused = _reuse_earlier_commit(place, candidates, state)
        if reused:
            return reused
        source = Source(hub.fetch(place), place.repo_id, place.revision)
    hashes = None
    if candidates:
        plan_conversion(source, state.options)  # an error if the weights do not fit the config
        hashes = source_hashes(source.folder, progress or (lambda *_: None))
        reused = _reuse(source, candidates, weight_hashes(hashes), state)
        if reused:
            return reused
    conversion = convert_checkpoint(source, state.folder, state.options, progress, hashes)
    record_source(state.folder, state)
    _log_notes(source, conversion.notes)
    return state.folder


def _log_notes(source: Source, notes: Sequence[str]) -> None:
    """Log the notes of a conversion, which are for the user, as warnings."""
    for note in notes:
        _LOG.warning("%s: %s", source.name, note)


def _reuse_earlier_commit(
    model: hub.HubModel, candidates: list[CachedWeights], state: SourceState
) -> Path | None:
    """Return a conversion that reuses an earlier commit's weights; None if no commit has the same.

    The Hub gives the hashes of large files, so equal weights are found without a download. If a new
    commit changes only the tokenizer, only the small files are downloaded.

    Raises:
        JanusError: as for ``find_source`` and ``convert_checkpoint``.
    """
    if not candidates:
        return None
    names, _ = hub.weight_names(model)
    hashes = tuple(sorted(model.hashes.get(name, "") for name in names))
    if all(candidate.source_hashes != hashes for candidate in candidates):
        return None
    # Weights in the Hub's cache are only linked to this commit. Others are not needed, because the
    # earlier conversion has them.
    has_weights = hub.has_blobs(model, names)
    fetch_files = hub.fetch if has_weights else hub.fetch_small_files
    source = Source(fetch_files(model), model.repo_id, model.revision)
    reused = _reuse(source, candidates, hashes, state)
    hub.record_branch(model)
    return reused


def _reuse(
    source: Source, candidates: list[CachedWeights], hashes: tuple[str, ...], state: SourceState
) -> Path | None:
    """Return a conversion that reuses the weights of a candidate; None if none has the same.

    Args:
        source: the source; only its small files are read.
        candidates: the conversions to choose from.
        hashes: SHA-256 of the source's weight files, sorted.
        state: the source's state.

    Raises:
        JanusError: as for ``convert_checkpoint``.
    """
    if all(candidate.source_hashes != hashes for candidate in candidates):
        return None
    published = read_published(source.folder)
    options = state.options
    config = with_quantization(published.config, options.bits, source.folder, options.recipe)
    path = source.folder / TOKENIZER_FILE
    tokenizer = prepare_tokenizer(path, config.prompt, published.added_tokens)
    reused = reuse_weights(candidates, hashes, config, tokenizer, state)
    if reused:
        _log_notes(source, published.notes)
    return reused


def _is_complete(folder: Path) -> bool:
    """Return whether a folder holds a converted model; False if its config cannot be read.

    A conversion gets its folder's name only when it is complete, so its config is enough to know.
    """
    try:
        return is_converted(folder)
    except ConfigError:
        return False
