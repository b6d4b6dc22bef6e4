"""Names of models on the Hub as people paste them: addresses, and ``owner/name@revision``.

This module does not import MLX, so commands can use it before they check their options.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from ..errors import CheckpointError, ImageError
from ..processing.file_names import local_path
from .hub import HUB_ID
from .hub_cache import repo_id_of

NO_MODEL = (
    "name a model: a converted folder, a PyTorch model folder, "
    "or a Hub id such as deepseek-ai/Janus-Pro-1B"
)

_HUB_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com"}
_OTHER_REPOSITORIES = {"spaces": "a space", "datasets": "a data set", "collections": "a collection"}
# A part of an address's path after which a revision stands.
_BEFORE_REVISION = ("tree", "blob", "resolve", "raw", "commit", "commits")


def path_in_address(text: str) -> str:
    """Return the path in a file:// address; any other text is returned unchanged.

    Raises:
        CheckpointError: the address has no full path, or names another machine.
    """
    try:
        return local_path(text)
    except ImageError as error:
        raise CheckpointError(str(error)) from None


def split_revision(text: str) -> tuple[str, str | None]:
    """Split a name that is no folder into a Hub id or short name, and its revision.

    Returns:
        The Hub id or short name, and the revision; None if the name has no revision. The first is
        not checked, except in an address.

    Raises:
        CheckpointError: the name is the address of anything but a model on the Hub, or ends in "@".
    """
    if address := _read_address(text):
        return address
    parts = text.split("/")
    # The path of an address, without its host: owner/name/tree/revision.
    if len(parts) >= 4 and parts[2] in _BEFORE_REVISION:
        return "/".join(parts[:2]), _revision_in(parts[2:])
    text = text.rstrip("/") or text
    base, at, revision = text.partition("@")
    if at and not revision:
        raise CheckpointError(f"{text[:200]} names no revision after the @: leave the @ out")
    # Someone may paste the folder name of the Hub's cache: models--owner--name.
    return repo_id_of(base) or base, revision or None


def _read_address(text: str) -> tuple[str, str | None] | None:
    """Return the Hub id and the revision in an address; None if the text is no address.

    Raises:
        CheckpointError: the address is not of a model on the Hub.
    """
    if text.lower().startswith("hf://"):
        # hf://[models/]owner/name[@revision][/file]
        parts = text[len("hf://") :].removeprefix("models/").split("/")
        base, _, revision = "/".join(parts[:2]).partition("@")
        return _checked_id(base.split("/"), "hf://"), unquote(revision) or None
    if match := re.fullmatch(r"git@(?P<host>[\w.-]+):(?P<path>.+)", text):
        text = f"ssh://{match['host']}/{match['path']}"
    first_part = text.split("/")[0].lower()
    if "://" not in text and first_part in _HUB_HOSTS:  # an address without its scheme
        text = f"https://{text}"
    if "://" not in text:
        return None
    try:
        address = urlsplit(text)
        host = (address.hostname or "").lower()
    except ValueError:  # such as an unclosed bracket
        host = ""
    if host not in _HUB_HOSTS | _own_hub():
        # The address may hold a password, so the message shows only its host.
        raise CheckpointError(
            f"the address at {host[:80] or 'no host'} is not a model's on the Hub: {NO_MODEL}"
        )
    parts = [unquote(part) for part in address.path.split("/") if part]
    if parts[:2] == ["api", "models"]:  # an address of the Hub's API
        parts = parts[2:]
    return _checked_id(parts[:2], host), _revision_in(parts[2:])


def _own_hub() -> set[str]:
    """Return the host of the Hub that ``HF_ENDPOINT`` names, or an empty set."""
    from huggingface_hub import constants

    return {urlsplit(constants.ENDPOINT).hostname or ""} - {""}


def _checked_id(parts: list[str], host: str) -> str:
    """Join the first two parts of an address's path to a Hub id, and check it.

    Args:
        parts: the first two parts, or fewer if the path has fewer.
        host: the address's host, or "hf://", for the error.

    Raises:
        CheckpointError: they are not the owner and the name of a model.
    """
    other_kind = _OTHER_REPOSITORIES.get(parts[0]) if parts else None
    repo_id = "/".join(parts).removesuffix(".git")
    if other_kind or not HUB_ID.fullmatch(repo_id):
        problem = f"is of {other_kind}" if other_kind else "names no owner and model"
        raise CheckpointError(f"the address at {host[:80]} {problem}: {NO_MODEL}")
    return repo_id


def _revision_in(parts: list[str]) -> str | None:
    """Return the revision in the end of an address's path; None if it has none.

    Args:
        parts: the path after the owner and the name, such as ["tree", "main"].
    """
    if len(parts) < 2 or parts[0] not in _BEFORE_REVISION:
        return None
    is_reference = parts[1] == "refs" and len(parts) >= 4  # a revision of three parts: refs/pr/1
    return "/".join(parts[1:4]) if is_reference else parts[1]
