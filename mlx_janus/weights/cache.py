"""The models on this machine: conversions, downloads, other programs' folders, and Janus-Tiny."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from ..config import JanusConfig
from ..errors import CheckpointError, JanusError, OptionError, OutputError
from .addresses import split_revision
from .atomic_folder import move_aside, read_leftover
from .checkup import find_faults, read_sizes
from .conversions import cache_folder, conversion_folders, records_of, superseded_folders
from .elsewhere import list_elsewhere
from .folder import OUR_FILES
from .hub_cache import commit_of
from .inner_folder import model_folder
from .names import TINY, expand_user, is_folder, resolve_short_name
from .safetensors_files import read_safetensors_header, weight_files

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo

State = Literal[
    "converted",
    "superseded",
    "left over",
    "unreadable",
    "downloaded",
    "partly downloaded",
    "elsewhere",
    "unusable",
    "in the package",
]
Place = Literal["cache", "hub", "elsewhere", "package"]

_WEIGHT_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class ModelEntry:
    """A model on this machine.

    The ``state`` "superseded" is a conversion whose sources use newer conversions. "left over" is
    the remainder of a killed conversion or removal. "unreadable" is a conversion that is damaged or
    from another release. "partly downloaded" is a download that lacks files. "unusable" is a model
    whose config is unreadable or not supported. A model in another program's folder is "unusable"
    also if it lacks files.
    """

    id: str  # 8 hexadecimal digits, or "tiny"
    source: str  # Hub id, or name of the source folder
    revision: str  # commit; "" for a local source
    state: State
    config: JanusConfig | None  # None if it cannot be read
    size: int  # bytes on disk
    # Seconds since 1970: last load, or last access if the file system records it.
    used: float | None
    path: Path
    place: Place
    names: tuple[str, ...] = ()  # further names: those of all sources that use a conversion

    @property
    def is_download(self) -> bool:
        """Whether the model is in the Hub's cache."""
        return self.place == "hub"

    @property
    def bits(self) -> int | None:
        """Bits per weight of the language model; None if not quantized, or without a config."""
        quantization = self.config.quantization if self.config else None
        return quantization.bits if quantization else None

    @property
    def recipe(self) -> str | None:
        """Name of the quantization recipe; None if there is none, or without a config."""
        quantization = self.config.quantization if self.config else None
        return quantization.recipe if quantization else None

    @property
    def dtype(self) -> str | None:
        """Type of the float weights; None without a config."""
        return self.config.dtype if self.config else None


def list_models() -> list[ModelEntry]:
    """Return every model on this machine: the most recently used first, Janus-Tiny at the end.

    Conversions in progress are left out.
    """
    found = [*_conversions(), *_downloads(), *_elsewhere()]
    tiny = ModelEntry(
        id="tiny",
        source="janus-tiny",
        revision="",
        state="in the package",
        config=JanusConfig.load(TINY / "config.json"),
        size=_folder_bytes(TINY),
        used=None,
        path=TINY,
        place="package",
    )
    by_use = sorted(found, key=lambda entry: entry.used or 0, reverse=True)  # 0: not known
    return [*by_use, tiny]


def find_models(name: str) -> list[ModelEntry]:
    """Return the models of this name on this machine.

    Args:
        name: a model's ID or path; the name or path of the folder that it was converted from; or
            its Hub id, short name or address, with or without ``@revision``.

    Raises:
        OptionError: no model has this name.
    """
    wanted = {name, os.fspath(resolve_short_name(name))}  # a short name becomes its Hub id
    path = expand_user(name)
    commit_start = ""  # matches every commit
    if is_folder(path):
        wanted.add(str(path.resolve()))
    else:
        with suppress(CheckpointError):  # such as for the address of another site
            repo_id, revision = split_revision(name)
            wanted.add(os.fspath(resolve_short_name(repo_id)))
            commit_start = revision or ""
    found = [
        entry
        for entry in list_models()
        if wanted & {entry.id, entry.source, str(entry.path), *entry.names}
        and entry.revision.startswith(commit_start)
    ]
    if not found:
        raise OptionError(
            f"no model {name[:200]!r} is here: name an ID or a model that `mlx-janus models` lists"
        )
    return found


def freed_bytes(entries: Iterable[ModelEntry]) -> int:
    """Return the bytes that removing these models would free.

    A file that is shared with a model that stays is not counted.
    """
    entries = list(entries)
    size = _unshared_bytes(entry.path for entry in entries if not entry.is_download)
    revisions = [entry.revision for entry in entries if entry.is_download]
    scanned = _scan_hub_cache() if revisions else None
    if scanned is None:
        return size
    plan = scanned.delete_revisions(*revisions)  # nothing is deleted until ``plan.execute``
    return size + plan.expected_freed_size


def _unshared_bytes(folders: Iterable[Path]) -> int:
    """Return the bytes that removing folders would free.

    A file with a hard link outside these folders is not counted.
    """
    # A file is identified by device and inode, which all of its hard links have in common.
    links: Counter[tuple[int, int]] = Counter()  # by file: the number of its links in the folders
    statuses: dict[tuple[int, int], os.stat_result] = {}  # by file
    for folder in folders:
        for path in folder.rglob("*"):
            with suppress(OSError):
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    file = (status.st_dev, status.st_ino)
                    links[file] += 1
                    statuses[file] = status
    # ``st_nlink`` counts all links to a file, on the entire file system.
    return sum(
        status.st_size for file, status in statuses.items() if links[file] >= status.st_nlink
    )


def remove_model(entry: ModelEntry) -> None:
    """Remove a conversion or a download from the disk.

    A conversion is renamed first, so that an interrupted removal leaves nothing that looks like a
    model. huggingface_hub removes a download, except for files that other revisions share.

    Raises:
        OptionError: the model is Janus-Tiny, which is part of the package, or in another program's
            folder.
        OutputError: a process has a file of the model open, or the removal fails.
    """
    check_removable(entry)
    if entry.is_download:
        scanned = _scan_hub_cache()
        if scanned:
            scanned.delete_revisions(entry.revision).execute()
        if entry.path.exists():  # huggingface_hub only logs a failure
            raise OutputError(
                f"{entry.path} cannot be removed: check the permissions of its folder"
            )
        return
    # A left-over folder has a hidden name already, with the pid of an ended process. Its new hidden
    # name has the pid of this process.
    leftover = read_leftover(entry.path)
    try:
        hidden = move_aside(entry.path, leftover.output_name if leftover else entry.path.name)
        shutil.rmtree(hidden)
    except OSError as error:
        raise OutputError(
            f"{entry.path} cannot be removed ({error.strerror}): check its permissions"
        ) from None


def check_removable(entry: ModelEntry) -> None:
    """Refuse to remove Janus-Tiny, a model of another program, or a model in use.

    Raises:
        OptionError: the model is Janus-Tiny, which is part of the package, or in another program's
            folder.
        OutputError: a process has a file of the model open.
    """
    if entry.place == "package":
        raise OptionError("Janus-Tiny is a part of the package: there is nothing to remove")
    if entry.place == "elsewhere":
        raise OptionError(f"{entry.path} is another program's folder: remove it there")
    files = {path.resolve() for path in entry.path.rglob("*") if path.is_file()}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's process, or an ended one
            if any(Path(file.path) in files for file in process.open_files()):
                raise OutputError(
                    f"{entry.source} ({entry.id}) is in use by process {process.pid} "
                    f"({process.name()}): end it first"
                )


def _conversions() -> list[ModelEntry]:
    """Return the cached conversions: complete ones, and those left over by an ended process.

    Complete conversions that no source uses any more have the state "superseded".
    """
    entries = [*_complete_conversions(), *_left_over()]
    converted = [entry.path for entry in entries if entry.state == "converted"]
    superseded = superseded_folders(converted)
    return [
        replace(entry, state="superseded") if entry.path in superseded else entry
        for entry in entries
    ]


def _complete_conversions() -> Iterator[ModelEntry]:
    """Yield the complete conversions in the cache, readable or not.

    A folder has the name of a conversion only once it is complete. One that also holds files of
    other programs is left out.
    """
    for folder in conversion_folders():
        with suppress(OSError):  # another process has just removed the folder
            if _holds_only_ours(folder):
                yield _read_conversion(folder)


def _left_over() -> Iterator[ModelEntry]:
    """Yield the hidden folders in the cache that killed conversions and removals left behind."""
    try:
        folders = [path for path in cache_folder().iterdir() if path.is_dir()]
    except OSError:  # the cache does not exist
        return
    for folder in folders:
        leftover = read_leftover(folder)
        # None: not a hidden folder of this package. Not abandoned: the process still works on it.
        if leftover is None or not leftover.is_abandoned:
            continue
        with suppress(OSError):  # another process has just removed the folder
            if _holds_only_ours(folder):
                yield ModelEntry(
                    id=folder.name.split(".")[-2],  # the random digits
                    source=leftover.output_name,
                    revision="",
                    state="left over",
                    config=None,
                    size=_folder_bytes(folder),
                    used=folder.stat().st_mtime,
                    path=folder,
                    place="cache",
                )


def _holds_only_ours(folder: Path) -> bool:
    """Return whether all files in a folder have names that a conversion gives its files."""
    return all(OUR_FILES.fullmatch(path.name) for path in folder.iterdir())


def _read_conversion(folder: Path) -> ModelEntry:
    """Return the entry of a cached conversion.

    Its state is "unreadable" if its config, or the header of its first weight file, is damaged.
    """
    unreadable = ModelEntry(
        id=folder.name[-16:-8],  # the first half of the hash at the end of the name
        source=folder.name,
        revision="",
        state="unreadable",
        config=None,
        size=_folder_bytes(folder),
        used=folder.stat().st_mtime,
        path=folder,
        place="cache",
    )
    with suppress(JanusError):
        config = JanusConfig.load(folder / "config.json")
        # The stamp is the metadata of a weight file. It names the source that the weights were
        # converted from. Each source that uses the conversion has a record. Conversions of old
        # releases have no records, so the stamp takes the place of a record.
        _, stamp = read_safetensors_header(weight_files(folder)[0])
        records = records_of(folder)
        newest_record = records[0] if records else {"name": stamp.get("source"), **stamp}
        names = [str(record.get(key)) for record in records for key in ("source", "name")]
        return replace(
            unreadable,
            state="converted",
            config=config,
            source=str(newest_record.get("name") or folder.name),
            revision=str(newest_record.get("revision", "")),
            used=(folder / "config.json").stat().st_mtime,  # loading a model sets this time
            names=(*names, stamp.get("source", "")),
        )
    return unreadable


def _downloads() -> Iterator[ModelEntry]:
    """Yield the models in the Hub's cache, one for each downloaded commit."""
    scanned = _scan_hub_cache()
    if scanned is None:
        return
    for repo in scanned.repos:
        if repo.repo_type != "model":  # a data set or a space
            continue
        for revision in repo.revisions:
            entry = _read_download(repo, revision)
            # The config is None for a model of another family, and for a damaged Janus. The name
            # tells a damaged Janus, which is listed too.
            if entry.config or "janus" in repo.repo_id.lower():
                yield entry


def _read_download(repo: CachedRepoInfo, revision: CachedRevisionInfo) -> ModelEntry:
    """Return the entry of a downloaded commit, of a published model or an uploaded conversion.

    Its config is None if it is missing, malformed, or of another family of models.
    """
    folder = model_folder(revision.snapshot_path)
    config, state = _config_and_state(folder, "downloaded")
    # The access times of the weight files tell the last use. Those of the configs do not, because
    # listing models reads configs.
    weights = [file for file in revision.files if file.file_path.suffix in _WEIGHT_SUFFIXES]
    times = [file.blob_last_accessed for file in weights]
    return ModelEntry(
        id=revision.commit_hash[:8],
        source=repo.repo_id,
        revision=revision.commit_hash,
        state=state,
        config=config,
        size=revision.size_on_disk,
        used=max(times, default=revision.last_modified),
        path=revision.snapshot_path,
        place="hub",
    )


def _elsewhere() -> Iterator[ModelEntry]:
    """Yield the models in the folders of other programs."""
    for found in list_elsewhere():
        config, state = _config_and_state(found.folder, "elsewhere")
        yield ModelEntry(
            id=hashlib.sha256(os.fsencode(found.folder)).hexdigest()[:8],
            source=found.name,
            revision=commit_of(found.folder),
            state=state,
            config=config,
            size=_folder_bytes(found.folder),
            used=None,
            path=found.folder,
            place="elsewhere",
        )


def _config_and_state(folder: Path, complete: State) -> tuple[JanusConfig | None, State]:
    """Return the config and the state of a download, or of another program's folder.

    Args:
        folder: the model folder.
        complete: the state if the folder lacks nothing, "downloaded" or "elsewhere".

    Returns:
        The config, None if it cannot be read or is not supported; and the state.
    """
    try:
        config = read_sizes(folder)
    except JanusError:
        return None, "unusable"
    if not find_faults(folder):
        return config, complete
    return config, "partly downloaded" if complete == "downloaded" else "unusable"


def _scan_hub_cache() -> HFCacheInfo | None:
    """Return huggingface_hub's list of the cached repositories, or None if it cannot read any."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, ValueError, OSError):  # absent, not a folder, or unreadable
        return None


def _folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder, at any depth."""
    sizes = []
    for path in folder.rglob("*"):
        with suppress(OSError):  # another process has just removed the file
            if path.is_file():
                sizes.append(path.stat().st_size)
    return sum(sizes)
