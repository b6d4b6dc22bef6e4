"""Finding a model in a subfolder of its folder or repository, such as ``tfmr`` of a training.

This module does not import MLX until a config is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError, JanusError

_DEPTH = 3  # levels of subfolders in which a config is looked for
_MOST_NAMED = 4  # folders that a message names
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


def configs_in(names: Iterable[str]) -> list[str]:
    """Return the subfolders that hold a ``config.json``, in the order of their names.

    Hidden folders, and folders more than ``_DEPTH`` levels deep, are left out.

    Args:
        names: paths of files, relative to the folder or repository.
    """
    found = []
    for name in names:
        path = PurePosixPath(name)
        folders = path.parts[:-1]
        is_hidden = any(part.startswith(".") for part in folders)
        if path.name == "config.json" and 1 <= len(folders) <= _DEPTH and not is_hidden:
            found.append("/".join(folders))
    return sorted(found)


def folders_with_config(folder: Path) -> list[Path]:
    """Return the subfolders of a folder that hold a ``config.json``, in the order of their names.

    The list is empty if the folder cannot be read.
    """
    patterns = ["/".join(["*"] * depth) + "/config.json" for depth in range(1, _DEPTH + 1)]
    try:
        paths = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    except OSError:
        return []
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [folder / name for name in configs_in(names)]


def holds_config(folder: Path) -> bool:
    """Return whether a folder, or one of its subfolders, holds a ``config.json``."""
    return (folder / "config.json").is_file() or bool(folders_with_config(folder))


def find_inner_model(folder: Path) -> Path | None:
    """Return the subfolder that holds the model of a folder without a config.

    It is the only subfolder with a Janus model. If no subfolder has one, it is the only subfolder
    with a config. Reading that config later gives an error that names the model's family.

    Returns:
        None if no subfolder has a config.

    Raises:
        CheckpointError: several subfolders may be meant; the message names them.
    """
    candidates = folders_with_config(folder)
    models = [candidate for candidate in candidates if _is_janus(candidate)]
    if len(models) > 1:
        raise CheckpointError(
            f"{folder} holds {len(models)} models in its folders: name one of them, "
            f"{_listed(map(str, models))}"
        )
    if models or len(candidates) == 1:
        return (models or candidates)[0]
    if candidates:
        raise CheckpointError(
            f"{folder} holds no Janus model, and parts of another in its folders "
            f"({_listed(map(str, candidates))}): name a Janus model's folder"
        )
    return None


def model_folder(folder: Path) -> Path:
    """Return the subfolder that holds the model of a folder without a config.

    The folder itself is returned if it has a config, or if no or several subfolders may be meant.
    """
    if (folder / "config.json").is_file():
        return folder
    try:
        return find_inner_model(folder) or folder
    except CheckpointError:
        return folder


def choose_inner(repo_id: str, names: Iterable[str]) -> str:
    """Return the subfolder of a Hub repository that holds its model; "": no subfolder does.

    If the repository itself has a config, no subfolder does. Otherwise, the only subfolder with a
    config and weights does.

    Args:
        repo_id: owner/name, for the message.
        names: paths of all files in the repository.

    Raises:
        CheckpointError: several subfolders have a config and weights. Their configs are not
            downloaded to find out which one is a Janus model.
    """
    names = set(names)
    if "config.json" in names:
        return ""
    weights = {name.rpartition("/")[0] for name in names if name.endswith(_WEIGHT_SUFFIXES)}
    candidates = [folder for folder in configs_in(names) if folder in weights]
    if len(candidates) > 1:
        raise CheckpointError(
            f"{repo_id} holds models in several folders ({_listed(candidates)}): "
            f"run `hf download {repo_id}`, and name one of them in the folder that it prints"
        )
    return candidates[0] if candidates else ""


def _is_janus(folder: Path) -> bool:
    """Return whether the config of a folder is a Janus model's."""
    from .checkup import read_sizes

    try:
        read_sizes(folder)
    except JanusError:
        return False
    return True


def _listed(names: Iterable[str]) -> str:
    """Return the first names as text, and the number of the others."""
    every = list(names)
    shown = ", ".join(name[:100] for name in every[:_MOST_NAMED])
    further = len(every) - _MOST_NAMED
    return f"{shown} and {further} more" if further > 0 else shown
