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

from ..config import MODEL_TYPE, JanusConfig, read_model_json
from ..errors import JanusError, OptionError, OutputError
from .folder import OUR_FILES, partial_name
from .published import read_published_sizes
from .safetensors_files import read_safetensors_header, weight_files
from .sources import TINY, cache_folder, resolve

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo

State = Literal[
    "converted", "left over", "unreadable", "downloaded", "partly downloaded", "in the package"
]

# Folder names of conversions. Complete: the first 8 of 16 digits are the ID. Being written or
# removed: the groups are the complete name, the writer's pid, and random digits that serve as ID.
_COMPLETE = re.compile(r".+-([0-9a-f]{8})[0-9a-f]{8}")
_PARTIAL = re.compile(r"\.(.+-[0-9a-f]{16})\.(\d+)\.([0-9a-f]{8})\.partial")
_WEIGHTS = (".safetensors", ".bin")


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
    used: (
        float | None
    )  # seconds since 1970: last load, or last access if the file system records it
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
        "tiny",
        "janus-tiny",
        "",
        "in the package",
        JanusConfig.load(TINY / "config.json"),
        _size(TINY),
        None,
        TINY,
    )
    return [*sorted(found, key=lambda entry: -(entry.used or 0)), tiny]


def find_models(name: str) -> list[ModelEntry]:
    """Return the models with this ID, Hub id, short name or path, or from a folder of this name.

    Raises:
        OptionError: there is none.
    """
    source = os.fspath(resolve(name))  # the Hub id or folder of a short name
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
    """Return the bytes that removing models frees, without files shared with other revisions."""
    entries = list(entries)
    size = sum(entry.size for entry in entries if not entry.is_download)
    revisions = [entry.revision for entry in entries if entry.is_download]
    scanned = _scan() if revisions else None
    # ``delete_revisions`` only plans the deletion: nothing is deleted until its ``execute``.
    return size + (scanned.delete_revisions(*revisions).expected_freed_size if scanned else 0)


def remove_model(entry: ModelEntry) -> None:
    """Remove a conversion or a download from the disk.

    A conversion is renamed first, so that a kill leaves nothing that looks like a model.
    huggingface_hub removes a download: its snapshot first, then the files that it links to. It
    keeps files that other revisions share.

    Raises:
        OptionError: the model is part of the package.
        OutputError: a process has a file of the model open, or the disk refuses.
    """
    check_removable(entry)
    if entry.is_download:
        scanned = _scan()
        if scanned:
            scanned.delete_revisions(entry.revision).execute()
        if entry.path.exists():  # huggingface_hub only logs that it failed
            raise OutputError(
                f"{entry.path} cannot be removed: check the permissions of its folder"
            )
        return
    # The new name of a left-over folder is made from the complete name that its own name contains.
    partial = _PARTIAL.fullmatch(entry.path.name)
    gone = partial_name(entry.path.with_name(partial[1] if partial else entry.path.name))
    try:
        entry.path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise OutputError(
            f"{entry.path} cannot be removed ({error.strerror}): check its permissions"
        ) from None


def check_removable(entry: ModelEntry) -> None:
    """Refuse to remove Janus-Tiny or a model in use.

    Raises:
        OptionError: the model is part of the package.
        OutputError: a process has a file of the model open, and may still read it.
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
    """Yield the cached conversions, complete or left over by a process that has ended."""
    try:
        folders = [
            path for path in cache_folder().iterdir() if path.is_dir() and not path.is_symlink()
        ]
    except OSError:  # the cache does not exist
        return
    for folder in folders:
        complete = _COMPLETE.fullmatch(folder.name)
        partial = _PARTIAL.fullmatch(folder.name)
        with suppress(OSError):  # another process has just removed it
            if not all(OUR_FILES.fullmatch(path.name) for path in folder.iterdir()):
                continue  # another program's folder
            if complete:
                yield _conversion(folder, complete[1])
            elif partial and not psutil.pid_exists(int(partial[2])):
                size = _size(folder)
                used = folder.stat().st_mtime
                yield ModelEntry(partial[3], partial[1], "", "left over", None, size, used, folder)


def _conversion(folder: Path, id: str) -> ModelEntry:
    """Return the entry of a conversion; "unreadable" if its config or weights are damaged.

    Of the weights, only the header of the first file is read.
    """
    size = _size(folder)
    used = folder.stat().st_mtime
    with suppress(JanusError):
        config = JanusConfig.load(folder / "config.json")
        # The stamp is the file's metadata: the conversion writes its source there.
        _, stamp = read_safetensors_header(weight_files(folder)[0])
        source = stamp.get("source") or folder.name
        revision = stamp.get("revision", "")
        used = (folder / "config.json").stat().st_mtime  # loading a model sets this time
        return ModelEntry(id, source, revision, "converted", config, size, used, folder)
    return ModelEntry(id, folder.name, "", "unreadable", None, size, used, folder)


def _downloads() -> Iterator[ModelEntry]:
    """Yield the models in the Hub's cache, one for each downloaded commit."""
    scanned = _scan()
    for repo in scanned.repos if scanned else ():
        for revision in repo.revisions if repo.repo_type == "model" else ():
            with suppress(JanusError):  # another family's model, or one without a config
                yield _download(repo, revision)


def _download(repo: CachedRepoInfo, revision: CachedRevisionInfo) -> ModelEntry:
    """Return the entry of a downloaded commit, in a published layout or converted.

    Raises:
        JanusError: its config is missing, malformed, or of another family.
    """
    path = revision.snapshot_path / "config.json"
    ours = read_model_json(path).get("model_type") == MODEL_TYPE
    config = JanusConfig.load(path) if ours else read_published_sizes(path)[0]
    state: State = "partly downloaded"
    with suppress(JanusError):
        weight_files(revision.snapshot_path)
        state = "downloaded"
    # Only weights tell the last use: listing models reads configs too.
    times = [
        file.blob_last_accessed for file in revision.files if file.file_path.suffix in _WEIGHTS
    ]
    used = max(times, default=revision.last_modified)
    commit = revision.commit_hash
    return ModelEntry(
        commit[:8],
        repo.repo_id,
        commit,
        state,
        config,
        revision.size_on_disk,
        used,
        revision.snapshot_path,
    )


def _scan() -> HFCacheInfo | None:
    """Scan the Hub's cache; None if it is absent or unreadable."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, ValueError, OSError):  # absent, not a folder, or unreadable
        return None


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder, at any depth."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
