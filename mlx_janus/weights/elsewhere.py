"""Models in the folders of other programs: LM Studio, ``~/models``, a Hub cache that was moved.

They are used where they are, and never changed or removed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, JanusError
from .checkup import find_faults, read_sizes
from .hub_cache import repos_in

MODEL_FOLDERS = (
    "~/.lmstudio/models",
    "~/.cache/lm-studio/models",  # LM Studio's until 2024
    "~/models",
    "~/.cache/huggingface/hub",  # the Hub's default cache, if HF_HOME or HF_HUB_CACHE moved it
)
"""Folders in which models are looked for, unless ``MLX_JANUS_MODELS`` names others."""


@dataclass(frozen=True)
class FoundFolder:
    """A model folder of another program."""

    name: str  # "owner/name", or only "name" if the folder has no owner's folder above it
    folder: Path


def model_folders() -> list[Path]:
    """Return the existing folders in which other programs keep models.

    ``MLX_JANUS_MODELS`` replaces the default folders: paths separated by ":". If it is empty, there
    are no folders. The Hub's cache that is in use is left out, since huggingface_hub reads it.
    """
    from huggingface_hub import constants

    given = os.environ.get("MLX_JANUS_MODELS")
    names = MODEL_FOLDERS if given is None else tuple(filter(None, given.split(os.pathsep)))
    in_use = Path(constants.HF_HUB_CACHE).resolve()
    folders: dict[Path, None] = {}  # an ordered set
    for name in names:
        path = Path(os.path.expanduser(name))  # noqa: PTH111 - keeps an unknown "~"
        if _is_folder(path) and path.resolve() != in_use:
            folders[path] = None
    return list(folders)


def list_elsewhere() -> list[FoundFolder]:
    """Return the folders of other programs that hold a Janus model, complete or not.

    A folder counts if its name contains "janus", or if its config is a Janus model's.
    """
    found = []
    for root in model_folders():
        found += [entry for entry in _entries_in(root) if _may_be_janus(entry)]
    return found


def find_elsewhere(name: str) -> Path | None:
    """Return the folder of a usable model of another program, or None if there is none.

    Args:
        name: "owner/name", or "name" for a folder without an owner's.
    """
    parts = name.split("/")
    # Too many parts, or one that is empty, hidden or "..".
    if len(parts) > 2 or not all(parts) or any(part.startswith(".") for part in parts):
        return None
    for root in model_folders():
        candidates = [root / name]
        candidates += [entry.folder for entry in _cached_in(root) if entry.name == name]
        for folder in candidates:
            if _is_folder(folder) and not find_faults(folder):
                return folder
    return None


def _entries_in(root: Path) -> Iterator[FoundFolder]:
    """Yield the folders in ``root``, and ``root`` itself, that may be a model's.

    A subfolder without a config counts as an owner's: its own subfolders are yielded. If it has
    none, it is yielded itself. From a cache of the Hub, one commit of each model is yielded.
    """
    if (root / "config.json").is_file():
        yield FoundFolder(root.name, root)
    yield from _cached_in(root)
    for child in _subfolders(root):
        if child.name.startswith("models--"):
            continue  # ``_cached_in`` has yielded it
        inner = [] if (child / "config.json").is_file() else _subfolders(child)
        for folder in inner:
            yield FoundFolder(f"{child.name}/{folder.name}", folder)
        if not inner:
            yield FoundFolder(child.name, child)


def _cached_in(root: Path) -> Iterator[FoundFolder]:
    """Yield a commit of each model in ``root``, if it is a cache of the Hub.

    It is the commit of the branch main, or else the only commit.
    """
    for repo in repos_in(root):
        try:
            yield FoundFolder(repo.repo_id, repo.snapshot(None))
        except CheckpointError:  # no complete commit, or several without a branch main
            continue


def _subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder that are not hidden; an empty list if it cannot be read."""
    try:
        return [
            path
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".") and _is_folder(path)
        ]
    except OSError:
        return []


def _is_folder(path: Path) -> bool:
    """Return whether a folder exists at a path; False if the path is too long for one."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _may_be_janus(entry: FoundFolder) -> bool:
    """Return whether a folder is a Janus model by its name, or else by its config."""
    name_without_owner = entry.name.rpartition("/")[2]
    if "janus" in name_without_owner.lower():
        return True
    try:
        read_sizes(entry.folder)
    except JanusError:
        return False
    return True
