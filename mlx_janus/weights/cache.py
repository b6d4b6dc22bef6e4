"""The models on this machine: cached conversions, downloads from the Hub, and Janus-Tiny."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from ..config import CONVERTED_MODEL_TYPE, JanusConfig, read_model_json
from ..errors import JanusError, OptionError, OutputError
from .folder import OUR_FILES, partial_name
from .published import read_published_sizes
from .safetensors_files import read_safetensors_header, weight_files
from .sources import TINY, cache_folder, resolve_short_name

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo

State = Literal[
    "converted", "left over", "unreadable", "downloaded", "partly downloaded", "in the package"
]

# Folder names of conversions: complete ones, and partial ones, which a process writes or removes.
_COMPLETE = re.compile(r".+-(?P<id>[0-9a-f]{8})[0-9a-f]{8}")
_PARTIAL = re.compile(
    r"\.(?P<complete_name>.+-[0-9a-f]{16})\.(?P<pid>\d+)\.(?P<id>[0-9a-f]{8})\.partial"
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class ModelEntry:
    """A model on this machine.

    The ``state`` "left over" is a remainder of a killed conversion or removal. "unreadable" is a
    conversion that is damaged or from another release. "partly downloaded" lacks weights.
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

    @property
    def is_download(self) -> bool:
        """Whether the model is in the Hub's cache."""
        return self.state in ("downloaded", "partly downloaded")

    @property
    def bits(self) -> int | None:
        """Bits per weight of the language model; None for float weights or without a config."""
        quantization = self.config.quantization if self.config else None
        return quantization.bits if quantization else None

    @property
    def recipe(self) -> str | None:
        """Name of the quantization recipe; None if it has none, or without a config."""
        quantization = self.config.quantization if self.config else None
        return quantization.recipe if quantization else None

    @property
    def dtype(self) -> str | None:
        """Type of the float weights; None without a config."""
        return self.config.dtype if self.config else None


def list_models() -> list[ModelEntry]:
    """Return every model on this machine, last used first and Janus-Tiny last.

    Conversions in progress are left out.
    """
    found = [*_conversions(), *_downloads()]
    tiny = ModelEntry(
        id="tiny",
        source="janus-tiny",
        revision="",
        state="in the package",
        config=JanusConfig.load(TINY / "config.json"),
        size=_folder_bytes(TINY),
        used=None,
        path=TINY,
    )
    return [*sorted(found, key=lambda entry: entry.used or 0, reverse=True), tiny]


def find_models(name: str) -> list[ModelEntry]:
    """Return the models of this name on this machine.

    Args:
        name: a model's ID, Hub id, short name, path, or the name of the folder that it was
            converted from.

    Raises:
        OptionError: no model has this name.
    """
    source = os.fspath(resolve_short_name(name))  # a short name becomes its Hub id or folder
    found = [
        entry
        for entry in list_models()
        if name == entry.id or source in (entry.source, str(entry.path))
    ]
    if not found:
        raise OptionError(
            f"no model {name[:200]!r} is here: name an ID or a model that `mlx-janus models` lists"
        )
    return found


def freed_bytes(entries: Iterable[ModelEntry]) -> int:
    """Return the bytes that removing these models would free.

    Files that a download shares with a revision that stays are not counted.
    """
    entries = list(entries)
    size = sum(entry.size for entry in entries if not entry.is_download)
    revisions = [entry.revision for entry in entries if entry.is_download]
    scanned = _scan_hub_cache() if revisions else None
    if scanned is None:
        return size
    plan = scanned.delete_revisions(*revisions)  # nothing is deleted until ``plan.execute``
    return size + plan.expected_freed_size


def remove_model(entry: ModelEntry) -> None:
    """Remove a conversion or a download from the disk.

    A conversion is renamed first, so that an interrupted removal leaves nothing that looks like a
    model. huggingface_hub removes a download, except for files that other revisions share.

    Raises:
        OptionError: the model is Janus-Tiny, which is part of the package.
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
    # A left-over folder has a partial name already, with the pid of an ended process. Its new name
    # has the pid of this one.
    partial = _PARTIAL.fullmatch(entry.path.name)
    complete_name = partial["complete_name"] if partial else entry.path.name
    renamed = partial_name(entry.path.with_name(complete_name))
    try:
        entry.path.rename(renamed)
        shutil.rmtree(renamed)
    except OSError as error:
        raise OutputError(
            f"{entry.path} cannot be removed ({error.strerror}): check its permissions"
        ) from None


def check_removable(entry: ModelEntry) -> None:
    """Refuse to remove Janus-Tiny or a model in use.

    Raises:
        OptionError: the model is Janus-Tiny, which is part of the package.
        OutputError: a process has a file of the model open.
    """
    if entry.state == "in the package":
        raise OptionError("Janus-Tiny is a part of the package: there is nothing to remove")
    files = {path.resolve() for path in entry.path.rglob("*") if path.is_file()}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's process, or an ended one
            if any(Path(file.path) in files for file in process.open_files()):
                raise OutputError(
                    f"{entry.source} ({entry.id}) is in use by process {process.pid} "
                    f"({process.name()}): end it first"
                )


def _conversions() -> Iterator[ModelEntry]:
    """Yield the cached conversions: complete ones, and those left over by an ended process."""
    try:
        folders = [
            path for path in cache_folder().iterdir() if path.is_dir() and not path.is_symlink()
        ]
    except OSError:  # the cache does not exist
        return
    for folder in folders:
        complete = _COMPLETE.fullmatch(folder.name)
        partial = _PARTIAL.fullmatch(folder.name)
        with suppress(OSError):  # another process has just removed the folder
            if not all(OUR_FILES.fullmatch(path.name) for path in folder.iterdir()):
                continue  # another program's folder
            if complete:
                yield _read_conversion(folder, complete["id"])
            elif partial and not psutil.pid_exists(int(partial["pid"])):  # else in progress
                yield ModelEntry(
                    id=partial["id"],
                    source=partial["complete_name"],
                    revision="",
                    state="left over",
                    config=None,
                    size=_folder_bytes(folder),
                    used=folder.stat().st_mtime,
                    path=folder,
                )


def _read_conversion(folder: Path, id: str) -> ModelEntry:
    """Return the entry of a cached conversion.

    Its state is "unreadable" if its config, or the header of its first weight file, is damaged.
    """
    size = _folder_bytes(folder)
    used = folder.stat().st_mtime
    with suppress(JanusError):
        config = JanusConfig.load(folder / "config.json")
        # The stamp, the metadata of a weight file, records the source of a conversion.
        _, stamp = read_safetensors_header(weight_files(folder)[0])
        source = stamp.get("source") or folder.name
        revision = stamp.get("revision", "")
        used = (folder / "config.json").stat().st_mtime  # loading a model sets this time
        return ModelEntry(id, source, revision, "converted", config, size, used, folder)
    return ModelEntry(
        id=id,
        source=folder.name,
        revision="",
        state="unreadable",
        config=None,
        size=size,
        used=used,
        path=folder,
    )


def _downloads() -> Iterator[ModelEntry]:
    """Yield the models in the Hub's cache, one for each downloaded commit."""
    scanned = _scan_hub_cache()
    if scanned is None:
        return
    for repo in scanned.repos:
        if repo.repo_type != "model":  # a data set or a space
            continue
        for revision in repo.revisions:
            with suppress(JanusError):  # another family's model, or one without a config
                yield _read_download(repo, revision)


def _read_download(repo: CachedRepoInfo, revision: CachedRevisionInfo) -> ModelEntry:
    """Return the entry of a downloaded commit, of a published model or an uploaded conversion.

    Raises:
        JanusError: the commit's config is missing, malformed, or of another family of models.
    """
    path = revision.snapshot_path / "config.json"
    converted = read_model_json(path).get("model_type") == CONVERTED_MODEL_TYPE
    config = JanusConfig.load(path) if converted else read_published_sizes(path)[0]
    state: State = "partly downloaded"
    with suppress(JanusError):  # raised if a weight file is missing
        weight_files(revision.snapshot_path)
        state = "downloaded"
    # Weight files tell the last use. Other files do not, because listing models reads configs too.
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
    )


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
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
