"""The folders of the Hub's cache: ``models--<owner>--<name>/snapshots/<commit>``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files import read_bounded

_REPO_FOLDER = re.compile(r"models--(?P<owner>[A-Za-z0-9._-]+?)--(?P<name>[A-Za-z0-9._-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"(?!.*\.\.)[\w][\w./-]*")  # a path below refs/ or snapshots/, without ".."


@dataclass(frozen=True)
class CachedRepo:
    """A model's folder in a cache of the Hub, wherever that cache is."""

    folder: Path
    repo_id: str

    def snapshot(self, revision: str | None) -> Path:
        """Return the folder of a commit: the one that a branch names, or the only one.

        Args:
            revision: branch, tag or commit; None: the branch main, or else the only commit.

        Raises:
            CheckpointError: the cache has no such commit with a config, or it has several and no
                branch main.
        """
        snapshots = self.folder / "snapshots"
        wanted = revision or "main"
        if _REVISION.fullmatch(wanted):
            # A branch or tag is a file in refs/ that holds its commit. Else try it as a commit.
            for commit in (_read_ref(self.folder / "refs" / wanted), wanted):
                if commit and (snapshots / commit / "config.json").is_file():
                    return snapshots / commit
        found = [path.parent for path in sorted(snapshots.glob("*/config.json"))]
        if revision is None and len(found) == 1:
            return found[0]
        if revision is None and found:
            raise CheckpointError(
                f"{self.folder} holds {len(found)} commits: name one of them, such as {found[0]}"
            )
        missing = f"no revision {revision[:80]!r}" if revision else "no complete download"
        raise CheckpointError(
            f"{self.folder} holds {missing}: name the model itself, {self.repo_id}, to download it"
        )


def repo_id_of(folder_name: str) -> str | None:
    """Return the Hub id of a folder's name, such as "models--me--janus"; None for other names."""
    match = _REPO_FOLDER.fullmatch(folder_name)
    return f"{match['owner']}/{match['name']}" if match else None


def repo_of(folder: Path) -> CachedRepo | None:
    """Return the model of the Hub's cache to which a folder belongs.

    Args:
        folder: the model's folder; its ``snapshots``, ``blobs`` or ``refs``; or a snapshot.

    Returns:
        None if the folder is not one of these.
    """
    resolved = folder.resolve()
    for candidate in (resolved, resolved.parent, resolved.parent.parent):
        repo_id = repo_id_of(candidate.name)
        parts_inside = resolved.relative_to(candidate).parts  # () for the model's folder itself
        if repo_id and (not parts_inside or parts_inside[0] in ("snapshots", "blobs", "refs")):
            return CachedRepo(candidate, repo_id)
    return None


def commit_of(folder: Path) -> str:
    """Return the commit of a snapshot's folder in the Hub's cache; "" for any other folder."""
    resolved = folder.resolve()
    is_snapshot = resolved.parent.name == "snapshots" and _COMMIT.fullmatch(resolved.name)
    return resolved.name if is_snapshot else ""


def repos_in(folder: Path) -> Iterator[CachedRepo]:
    """Yield the models of a cache of the Hub, in the order of their names."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:  # absent or unreadable
        return
    for name in names:
        if repo_id := repo_id_of(name):
            yield CachedRepo(folder / name, repo_id)


def _read_ref(path: Path) -> str:
    """Return the commit in a file of ``refs``; "" if the file cannot be read."""
    try:
        return read_bounded(path, 200).decode().strip()
    except (OSError, ValueError):
        return ""
