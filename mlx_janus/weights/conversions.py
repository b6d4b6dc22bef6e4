"""The cache of conversions: find a source's conversion, reuse its weights, find superseded ones.

A conversion's folder is named after its source, with a hash of everything that it depends on. Next
to the model it holds a small record for each source that uses it. So a source that was moved,
copied or touched needs no second conversion. And if a source later uses another conversion, its
record there is newer. This shows that the earlier conversion is superseded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs

from ..config import ImageConfig, JanusConfig, PromptConfig, VQGenerationConfig
from ..errors import JanusError, OutputError
from ..files import MAX_JSON_FILE, read_bounded, write_atomically
from ..processing.tokenizer import TOKENIZER_FILE
from ..sections import JsonError, read_json
from .atomic_folder import atomic_folder
from .convert import ConvertOptions
from .folder import RECORD_NAME, is_converted, stamped_hashes
from .quantize import choose_rule
from .safetensors_files import find_weights, read_safetensors_header, weight_files

CONVERSION_NAME = re.compile(r".+-(?P<id>[0-9a-f]{8})[0-9a-f]{8}")
"""Pattern of the folder name of a complete conversion, for ``fullmatch``."""

_STATE_VERSION = 2  # raised when a release converts the same source differently
_MAX_LABEL = 100  # bytes of the readable part of a folder's name


def cache_folder() -> Path:
    """Return the folder of cached conversions: ``MLX_JANUS_CACHE``, else the platform's default."""
    given = os.environ.get("MLX_JANUS_CACHE")
    if not given:
        return Path(platformdirs.user_cache_dir("mlx_janus"))
    return Path(os.path.expanduser(given))  # noqa: PTH111  keeps the "~" of an unknown user


@dataclass(frozen=True)
class SourceState:
    """A source in its present state, and the precision to convert it to.

    ``facts`` are JSON values that change whenever the result of a conversion may change. For a
    model on the Hub, they are its commit. For a folder, they are its config, its tokenizer, and the
    sizes and times of its weight files.
    """

    source: str  # Hub id, or path of the source folder
    branch: str  # requested branch, tag or commit on the Hub; "" for a folder
    name: str  # shown to users
    revision: str  # commit; "" if it is not known
    facts: tuple[object, ...]
    options: ConvertOptions  # only bits and recipe count

    @property
    def slot(self) -> str:
        """Hash of the source's name and the precision. It stays when the source's content changes.

        If several conversions have a record with this slot, the source uses the newest record's.
        """
        return _digest([self.source, self.branch, self._precision])

    @property
    def state(self) -> str:
        """Hash of everything that the result of the conversion depends on."""
        return _digest([self.facts, self._precision, _STATE_VERSION])

    @property
    def folder(self) -> Path:
        """The conversion's folder in the cache, whether or not it exists."""
        label = self.name.replace("/", "--").encode(errors="replace")[:_MAX_LABEL]
        options = self.options
        quantization = f"{options.recipe or f'{options.bits}bit'}-" if self._precision else ""
        name = f"{label.decode(errors='ignore')}-{quantization}"
        return cache_folder() / f"{name}{_digest([self.slot, self.state])}"

    @property
    def _precision(self) -> object:
        """The bits, or the recipe and its rule, which releases may change; None: not quantized."""
        rule = choose_rule(self.options.bits, self.options.recipe)
        if rule and self.options.recipe:
            return [self.options.recipe, asdict(rule)]
        return self.options.bits


def _digest(value: object) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# Finding


def find_conversion(source: SourceState) -> Path | None:
    """Return the conversion of a source in the cache, or None if there is none.

    To record this use, the modification time of the conversion's ``config.json`` is set to now.
    """
    found = source.folder if is_converted(source.folder) else _find_by_record(source)
    if found:
        _note_use(found, source)
    return found


def _find_by_record(source: SourceState) -> Path | None:
    """Return the conversion with a record of this source in this state, or None."""
    for folder in conversion_folders():
        record = _read_record(_record_path(folder, source.slot))
        if record.get("state") == source.state and is_converted(folder):
            return folder
    return None


def conversion_folders() -> Iterator[Path]:
    """Yield the folders in the cache that are named as complete conversions are."""
    try:
        folders = sorted(cache_folder().iterdir())
    except OSError:  # the cache does not exist
        return
    for folder in folders:
        name_fits = CONVERSION_NAME.fullmatch(folder.name) and not folder.name.startswith(".")
        if name_fits and folder.is_dir() and not folder.is_symlink():
            yield folder


# Records: source-<slot>.json in a conversion's folder


def record_source(folder: Path, source: SourceState) -> None:
    """Record that a source uses a conversion. In a read-only cache, do nothing."""
    record = {
        "source": source.source,
        "name": source.name,
        "revision": source.revision,
        "state": source.state,
    }
    with contextlib.suppress(OSError):
        write_atomically(_record_path(folder, source.slot), json.dumps(record, indent=1) + "\n")


def _note_use(folder: Path, source: SourceState) -> None:
    """Set the modification times of a conversion's config and of the source's record to now.

    A record that is missing, or is of another state of the source, is written first.
    """
    record = _record_path(folder, source.slot)
    if _read_record(record).get("state") != source.state:
        record_source(folder, source)
    with contextlib.suppress(OSError):  # a cache may be read-only
        os.utime(record)
        os.utime(folder / "config.json")


def _record_path(folder: Path, slot: str) -> Path:
    """Return the path of a conversion's record for a slot."""
    return folder / f"source-{slot}.json"


def _read_record(path: Path) -> Mapping[str, Any]:
    """Return a record; an empty dict if it is missing or damaged."""
    try:
        return read_json(path)
    except JsonError:
        return {}


def records_of(folder: Path) -> list[Mapping[str, Any]]:
    """Return the records of a conversion, the last used first."""
    times = _record_times(folder)
    names = sorted(times, key=lambda name: times[name], reverse=True)
    return [_read_record(folder / name) for name in names]


def _record_times(folder: Path) -> dict[str, int]:
    """Return the modification times of a conversion's records, in nanoseconds, by file name."""
    times = {}
    for path in folder.glob("source-*.json"):
        with contextlib.suppress(OSError):  # another process has just removed the folder
            if RECORD_NAME.fullmatch(path.name):
                times[path.name] = path.stat().st_mtime_ns
    return times


def superseded_folders(folders: Iterable[Path]) -> set[Path]:
    """Return the conversions that no source uses any more.

    For each record of such a conversion, another conversion has a newer record with the same slot.
    A conversion of an earlier release has no records. It is superseded if a conversion that is kept
    has the same content.
    """
    records = {folder: _record_times(folder) for folder in folders}
    newest: dict[str, int] = {}  # time of the newest record, by its file name, which has the slot
    for times in records.values():
        for name, time in times.items():
            newest[name] = max(time, newest.get(name, 0))
    superseded = {
        folder
        for folder, times in records.items()
        if times and all(newest[name] > time for name, time in times.items())
    }
    kept = {_content(folder) for folder in records if records[folder] and folder not in superseded}
    for folder, times in records.items():
        if not times:
            content = _content(folder)
            if content in kept:
                superseded.add(folder)
            kept.add(content)
    return superseded


def _content(folder: Path) -> object:
    """Return a value that is equal for conversions with the same config, weights and tokenizer.

    For a damaged conversion this is its folder, which equals no other.
    """
    try:
        config = JanusConfig.load(folder / "config.json")
        _, stamp = read_safetensors_header(weight_files(folder)[0])
        hashes = weight_hashes(stamped_hashes(folder, stamp))
    except JanusError:
        return folder
    return (config, hashes, stamp.get("dtype"), _file_hash(folder / TOKENIZER_FILE))


def _file_hash(path: Path) -> str:
    """Return the SHA-256 of a small file; "" if it cannot be read."""
    try:
        return hashlib.sha256(read_bounded(path, MAX_JSON_FILE)).hexdigest()
    except OSError:
        return ""


# Equal weights


@dataclass(frozen=True)
class CachedWeights:
    """A conversion in the cache, with the facts by which equal weights are found."""

    folder: Path
    config: JanusConfig
    source_hashes: tuple[str, ...]  # SHA-256 of the source's weight files, sorted


def conversions_like(config: JanusConfig) -> list[CachedWeights]:
    """Return the conversions in the cache whose config gives the same weights as ``config``.

    The same source files are presumed: the caller compares their hashes. ``dtype`` is not compared,
    since weights keep their own types; conversions that cast them are left out.
    """
    found = []
    for folder in conversion_folders():
        with contextlib.suppress(JanusError, OSError):  # damaged, or just removed
            stored = JanusConfig.load(folder / "config.json")
            if _weight_values(stored) != _weight_values(config):
                continue
            _, stamp = read_safetensors_header(weight_files(folder)[0])
            if stamp.get("dtype"):  # the weights were cast
                continue
            hashes = stamped_hashes(folder, stamp)
            found.append(CachedWeights(folder, stored, weight_hashes(hashes)))
    return found


def weight_hashes(hashes: Mapping[str, str]) -> tuple[str, ...]:
    """Return the sorted hashes of the weight files, from the hashes of all files by name."""
    not_weights = ("config.json", TOKENIZER_FILE)
    return tuple(sorted(str(value) for name, value in hashes.items() if name not in not_weights))


def _weight_values(config: JanusConfig) -> JanusConfig:
    """Return a config that keeps only the values that affect the weights.

    All other values are the same in every result, so that two results can be compared.
    """
    generation = config.generation
    if isinstance(generation, VQGenerationConfig):
        generation = replace(generation, cfg_weight=1.0, temperature=1.0)
    return replace(
        config,
        prompt=PromptConfig(),
        image=ImageConfig(image_size=config.image.image_size),
        generation=generation,
        dtype="float32",
    )


def reuse_weights(
    candidates: Collection[CachedWeights],
    hashes: Collection[str],
    config: JanusConfig,
    tokenizer: str,
    source: SourceState,
) -> Path | None:
    """Return a conversion that has, or links to, the weights of a candidate.

    A candidate with the same config and tokenizer is returned itself. Otherwise a new folder is
    written. Its weight files are hard links to the candidate's and take no space.

    Args:
        candidates: the conversions to choose from, from ``conversions_like``.
        hashes: SHA-256 of the source's weight files.
        config: the config of the wanted conversion; its ``dtype`` is ignored.
        tokenizer: the content of the wanted conversion's ``tokenizer.json``.
        source: the source's state.

    Returns:
        None if no candidate comes from weight files with these hashes.

    Raises:
        OutputError: the folder cannot be written.
    """
    wanted = tuple(sorted(hashes))
    matching = [candidate for candidate in candidates if candidate.source_hashes == wanted]
    for candidate in matching:
        same_config = replace(config, dtype=candidate.config.dtype) == candidate.config
        if same_config and _holds(candidate.folder / TOKENIZER_FILE, tokenizer):
            _note_use(candidate.folder, source)
            return candidate.folder
    if not matching:
        return None
    donor = matching[0]
    _link_conversion(donor, replace(config, dtype=donor.config.dtype), tokenizer, source)
    return source.folder


def _holds(path: Path, text: str) -> bool:
    """Return whether a file holds this text."""
    try:
        return read_bounded(path, MAX_JSON_FILE) == text.encode()
    except OSError:
        return False


def _link_conversion(
    donor: CachedWeights, config: JanusConfig, tokenizer: str, source: SourceState
) -> None:
    """Write the conversion of a source, with hard links to the weight files of another conversion.

    Where the file system has no hard links, the files are copied.

    Raises:
        OutputError: the folder cannot be written.
    """
    weights = find_weights(donor.folder)
    files = [*weights.files, *([weights.index] if weights.index else [])]
    with atomic_folder(source.folder, overwrite=False) as folder:
        try:
            for file in files:
                _link_or_copy(file, folder / file.name)
            (folder / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
            config.dump(folder / "config.json")
        except OSError as error:
            raise OutputError(
                f"{source.folder} cannot be written ({error.strerror}): free some space, "
                "or set MLX_JANUS_CACHE to another folder"
            ) from None
    record_source(source.folder, source)


def _link_or_copy(file: Path, target: Path) -> None:
    """Make a hard link to a file, or copy it.

    Raises:
        OSError: the target cannot be written.
    """
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
