"""Understanding a model's name: a folder, a Hub id, a short name or a pasted address.

Also understood are ``owner/name@revision``, the folders of the Hub's cache, and the models of other
programs (``elsewhere.py``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, HubError, OptionError, escape
from .addresses import NO_MODEL, path_in_address, split_revision
from .atomic_folder import recover
from .elsewhere import find_elsewhere, list_elsewhere
from .hub import HUB_ID
from .hub_cache import commit_of, repo_of, repos_in

TINY = Path(__file__).parent.parent / "assets" / "tiny"
"""Janus-Tiny, the model inside the package."""

SHORT_NAMES = {
    "janus-1.3b": "deepseek-ai/Janus-1.3B",
    "janus-pro-1b": "deepseek-ai/Janus-Pro-1B",
    "janus-pro-7b": "deepseek-ai/Janus-Pro-7B",
    "tiny": str(TINY),
}
"""Short names of the published models and of Janus-Tiny, matched without regard to case."""

_MAX_NAME = 200  # characters; some systems raise an error for a longer path


@dataclass(frozen=True)
class ModelName:
    """A model's name, understood: a folder on this machine, or a model on the Hub.

    Exactly one of ``folder`` and ``repo_id`` is not None.
    """

    shown: str  # for people: the Hub id, or the folder's name
    folder: Path | None = None
    repo_id: str | None = None
    # Branch, tag or commit. None: the branch main on the Hub, or a folder without a known commit.
    revision: str | None = None


def resolve_short_name(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Replace a short name by its Hub id or folder, unless a folder with this name exists.

    Any other name is returned unchanged.
    """
    known = SHORT_NAMES.get(os.fspath(name).lower())
    return name if known is None or is_folder(Path(name)) else known


def understand_name(name: str | os.PathLike[str], revision: str | None = None) -> ModelName:
    """Understand a model's name. The Hub is not asked.

    A folder at this path comes first. If no revision is named, a usable folder of another program
    comes next. The Hub comes last.

    Args:
        name: a folder, a file:// address, a Hub id with or without ``@revision``, a short name, the
            address of a model's page, or the name of a model's folder in the Hub's cache.
        revision: branch, tag or commit on the Hub.

    Raises:
        HubError: the name is a folder, which cannot have a ``revision``.
        OptionError: the name has another revision than ``revision``.
        CheckpointError: the name is no folder and no Hub id, or the folder holds several models or
            not the commit.
    """
    text = path_in_address(os.fspath(name))
    path = expand_user(resolve_short_name(text))
    if not is_folder(path):
        recover(path)  # a killed conversion may have left it under a hidden name
    if is_folder(path):
        return _understand_folder(path, revision)
    bare_name, own_revision = split_revision(text.strip())
    if own_revision and revision not in (None, own_revision):
        raise OptionError(
            f"the model's name says revision {own_revision[:80]!r} and the option "
            f"says {str(revision)[:80]!r}: give one of them"
        )
    revision = revision or own_revision
    bare_name = os.fspath(resolve_short_name(bare_name))
    path = expand_user(bare_name)
    if is_folder(path):
        return _understand_folder(path, revision)
    found = find_elsewhere(bare_name) if revision is None else None
    if found is not None:
        return ModelName(bare_name, folder=found, revision=commit_of(found) or None)
    too_long = len(bare_name) > _MAX_NAME
    if too_long or not HUB_ID.fullmatch(bare_name) or path.exists():  # a path that exists is a file
        raise CheckpointError(f"{escape(text, 160)} {_why_unknown(bare_name)}")
    return ModelName(bare_name, repo_id=bare_name, revision=revision)


def is_folder(path: Path) -> bool:
    """Return whether a folder exists at a path. Any text may be the path, such as a Hub id."""
    try:
        return path.is_dir()
    except OSError:  # the name is too long for a folder
        return False


def expand_user(name: str | os.PathLike[str]) -> Path:
    """Replace a leading "~" with the home folder; keep the "~" of an unknown user."""
    # Path.expanduser would raise for an unknown user.
    return Path(os.path.expanduser(name))  # noqa: PTH111


# Folders


def _understand_folder(path: Path, revision: str | None) -> ModelName:
    """Understand the name of an existing folder.

    A model's folder in the Hub's cache stands for one of its commits: the commit that ``revision``
    names; without a revision, that of the branch main, or else the only one.

    Raises:
        HubError: there is a revision, and the folder is not a model's in the Hub's cache.
        CheckpointError: the folder is in the Hub's cache and holds no such commit, or it holds no
            model itself but folders of models.
    """
    holds_model = (path / "config.json").is_file()
    repo = repo_of(path)
    if repo and not holds_model:
        path = repo.snapshot(revision)
        revision = None  # it has chosen the commit
    elif not holds_model:
        _refuse_folder_of_models(path)
    if revision is not None:
        raise HubError(f"{path} is a folder, which has no revisions: leave revision out")
    if repo:
        return ModelName(repo.repo_id, folder=path, revision=commit_of(path) or None)
    shown = "janus-tiny" if path == TINY else path.resolve().name
    return ModelName(shown or "model", folder=path)  # the root folder has an empty name


def _refuse_folder_of_models(path: Path) -> None:
    """Refuse a folder without a config if folders in it hold models.

    Raises:
        CheckpointError: there are such folders; the message names one.
    """
    cached = next(repos_in(path), None)
    if cached:
        raise CheckpointError(
            f"{path} is the Hub's cache: name one of its models, such as {cached.repo_id}"
        )
    for pattern in ("*/config.json", "*/*/config.json"):
        config = min(path.glob(pattern), default=None)
        if config:
            raise CheckpointError(
                f"{path} holds no model itself: name a folder in it, such as {config.parent}"
            )


# Errors


def _why_unknown(name: str) -> str:
    """Return the end of an error message that begins with an unknown model name: why, and a fix."""
    path = expand_user(name)
    if len(name) <= _MAX_NAME and path.is_file():
        if (path.parent / "config.json").is_file():
            return f"is a file: name its folder, {path.parent}"
        return f"is a file: {NO_MODEL}"
    similar = _similar_names(name)
    if similar:
        return f"is neither a folder nor a Hub id: {similar[0]} is on this machine, name that"
    return f"is neither a folder nor a Hub id: {NO_MODEL}"


def _similar_names(name: str) -> list[str]:
    """Return the Hub ids of models on this machine with this name and any owner."""
    from huggingface_hub import constants

    known = [repo.repo_id for repo in repos_in(Path(constants.HF_HUB_CACHE))]
    known += [entry.name for entry in list_elsewhere()]
    return [known_name for known_name in known if known_name.lower().endswith(f"/{name.lower()}")]
