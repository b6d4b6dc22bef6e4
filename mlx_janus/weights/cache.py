"""The models on this machine: conversions in our cache, downloads in the Hub's, Janus-Tiny in the package."""

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

# What `sources` names a conversion, and what one is called before it is whole and while it is removed.
_COMPLETE = re.compile(r".+-([0-9a-f]{8})[0-9a-f]{8}")
_PARTIAL = re.compile(r"\.(.+-[0-9a-f]{16})\.(\d+)\.([0-9a-f]{8})\.partial")
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class ModelEntry:
    """A model on this machine.

    ``state`` is "left over" for what a killed conversion or removal left, "unreadable" for a conversion that is damaged
    or of another release, "partly downloaded" where weights are missing.
    """

    id: str  # 8 hexadecimal digits, or "tiny"
    source: str  # Hub id, or the name of the folder that was converted
    revision: str  # commit, or "" where there is none
    state: State
    config: JanusConfig | None  # None where it cannot be read
    size: int  # bytes on disk
    used: (
        float | None
    )  # seconds since 1970: for a conversion when it was last loaded, for a download as far as the
    # file system records when weights are read
    path: Path

    @property
    def is_download(self) -> bool:
        """Whether it lies in the Hub's cache."""
        return self.state in ("downloaded", "partly downloaded")

    @property
    def bits(self) -> int | None:
        """Of the language model; None for float weights."""
        return self.config.quantization.bits if self.config and self.config.quantization else None

    @property
    def recipe(self) -> str | None:
        """What it was quantized by; None for float weights, and for bits that were asked for."""
        return self.config.quantization.recipe if self.config and self.config.quantization else None

    @property
    def dtype(self) -> str | None:
        """Of the float weights."""
        return self.config.dtype if self.config else None


def list_models() -> list[ModelEntry]:
    """Every model that is at hand, the last used first. Conversions that are under way are left out."""
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
    """The models with this ID, or made from this Hub id or short name.

    Raises:
        OptionError: there is none.
    """
    source = os.fspath(resolve(name))
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
    """What removing them frees; files that other revisions of a download share stay."""
    entries = list(entries)
    size = sum(entry.size for entry in entries if not entry.is_download)
    revisions = [entry.revision for entry in entries if entry.is_download]
    scanned = _scan() if revisions else None
    return size + (scanned.delete_revisions(*revisions).expected_freed_size if scanned else 0)


def remove_model(entry: ModelEntry) -> None:
    """Remove a conversion or a download from the disk, and nothing else.

    A conversion loses its name first, so that a kill leaves nothing that looks like a model. huggingface_hub removes
    downloads, names before contents, and keeps what other revisions share.

    Raises:
        OptionError, OutputError: as ``check_removable``, or the disk refuses.
    """
    check_removable(entry)
    if entry.is_download:
        scanned = _scan()
        if scanned:
            scanned.delete_revisions(entry.revision).execute()
        if entry.path.exists():  # huggingface_hub only logs what it could not remove
            raise OutputError(
                f"{entry.path} cannot be removed: check the permissions of its folder"
            )
        return
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
    """Refuse to remove what is not ours to remove, or in use.

    Raises:
        OptionError: it is part of the package.
        OutputError: a process has one of its files open, since it may yet need it.
    """
    if entry.state == "in the package":
        raise OptionError("Janus-Tiny is a part of the package: there is nothing to remove")
    files = {path.resolve() for path in entry.path.rglob("*") if path.is_file()}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's, or one that has ended
            if any(Path(file.path) in files for file in process.open_files()):
                raise OutputError(
                    f"{entry.source} ({entry.id}) is in use by process {process.pid} ({process.name()}): end it first"
                )


def _conversions() -> Iterator[ModelEntry]:
    try:
        folders = [
            path for path in cache_folder().iterdir() if path.is_dir() and not path.is_symlink()
        ]
    except OSError:  # no cache yet
        return
    for folder in folders:
        complete, partial = _COMPLETE.fullmatch(folder.name), _PARTIAL.fullmatch(folder.name)
        with suppress(OSError):  # removed meanwhile
            if not all(OUR_FILES.fullmatch(path.name) for path in folder.iterdir()):
                continue  # not of our making, whatever its name
            if complete:
                yield _conversion(folder, complete[1])
            elif partial and not psutil.pid_exists(int(partial[2])):
                size, used = _size(folder), folder.stat().st_mtime
                yield ModelEntry(partial[3], partial[1], "", "left over", None, size, used, folder)


def _conversion(folder: Path, id: str) -> ModelEntry:
    size, used = _size(folder), folder.stat().st_mtime
    with suppress(JanusError):
        config = JanusConfig.load(folder / "config.json")
        stamp = read_safetensors_header(weight_files(folder)[0])[1]
        source, revision = stamp.get("source") or folder.name, stamp.get("revision", "")
        used = (folder / "config.json").stat().st_mtime
        return ModelEntry(id, source, revision, "converted", config, size, used, folder)
    return ModelEntry(id, folder.name, "", "unreadable", None, size, used, folder)


def _downloads() -> Iterator[ModelEntry]:
    scanned = _scan()
    for repo in scanned.repos if scanned else ():
        for revision in repo.revisions if repo.repo_type == "model" else ():
            with suppress(JanusError):  # of another family, or without a config
                yield _download(repo, revision)


def _download(repo: CachedRepoInfo, revision: CachedRevisionInfo) -> ModelEntry:
    path = revision.snapshot_path / "config.json"
    ours = read_model_json(path).get("model_type") == MODEL_TYPE
    config = JanusConfig.load(path) if ours else read_published_sizes(path)[0]
    state: State = "partly downloaded"
    with suppress(JanusError):
        weight_files(revision.snapshot_path)
        state = "downloaded"
    # Configs are read by every listing, weights only by a use.
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
    """What the Hub's cache holds; None where there is no such folder."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, ValueError, OSError):  # absent, a file, unreadable
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
