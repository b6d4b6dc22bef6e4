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
# Parts of an address's path that come before a revision.
_BEFORE_REVISION = ("tree", "blob", "resolve", "raw", "commit", "commits")


def path_in_address(text: str) -> str:
    """Return the path in a file:// address; any other text is returned unchanged.

    Raises:
        CheckpointError: the address has no absolute path, or names another machine.
    """
    try:
        return local_path(text)
    except ImageError as error:
        raise CheckpointError(str(error)) from None


def split_revision(text: str) -> tuple[str, str | None]:
    """Split a model's name into its Hub id or short name, and its revision.

    Args:
        text: the name. The caller has found no folder of this name.

    Returns:
        The Hub id or short name; and the revision, None if the name has none. The form of the Hub
        id is checked only if the name is an address.

    Raises:
        CheckpointError: the name is the address of anything but a model on the Hub, or ends in "@".
    """
    if address := _read_address(text):
        return address
    parts = text.split("/")
    # The path of an address, without its host: owner/name/tree/revision.
    if len(parts) >= 4 and parts[2] in _BEFORE_REVISION:
        return "/".join(parts[:2]), _revision_in(parts[2:])
    text = text.rstrip("/") or text  # "/" itself is kept
    base, at, revision = text.partition("@")
    if at and not revision:
        raise CheckpointError(f"{text[:200]} names no revision after the @: leave the @ out")
    # Someone may paste the folder name of the Hub's cache: models--owner--name.
    bare_name = repo_id_of(base) or base
    return bare_name, revision or None


def _read_address(text: str) -> tuple[str, str | None] | None:
    """Return the Hub id and the revision in an address; None if the text is no address.

    The revision is None if the address has none.

    Raises:
        CheckpointError: the address is not of a model on the Hub.
    """
    if text.lower().startswith("hf://"):
        # hf://[models/]owner/name[@revision][/file], where a revision's own slashes are "%2F".
        parts = text[len("hf://") :].removeprefix("models/").split("/")
        base, _, revision = "/".join(parts[:2]).partition("@")
        return _checked_id(base.split("/"), "hf://"), unquote(revision) or None
    # An address of git by SSH, such as git@hf.co:owner/name, becomes one with a scheme.
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
    """Return a set with the host of the address ``HF_ENDPOINT``; it is empty if there is none."""
    from huggingface_hub import constants

    return {urlsplit(constants.ENDPOINT).hostname or ""} - {""}


def _checked_id(parts: list[str], host: str) -> str:
    """Join the first two parts of an address's path to a Hub id, and check it.

    Args:
        parts: the first two parts, or fewer if the path has fewer.
        host: the address's host, or "hf://", for the error.

    Raises:
        CheckpointError: the parts are not the owner and the name of a model.
    """
    other_kind = _OTHER_REPOSITORIES.get(parts[0]) if parts else None
    repo_id = "/".join(parts).removesuffix(".git")
    if other_kind or not HUB_ID.fullmatch(repo_id):
        problem = f"is of {other_kind}" if other_kind else "names no owner and model"
        raise CheckpointError(f"the address at {host[:80]} {problem}: {NO_MODEL}")
    return repo_id


def _revision_in(path_end: list[str]) -> str | None:
    """Return the revision that an address's path names after the model; None if it names none.

    Args:
        path_end: the parts after the owner and the name, such as ["tree", "main"].
    """
    if len(path_end) < 2 or path_end[0] not in _BEFORE_REVISION:
        return None
    rest = path_end[1:]  # the revision, and perhaps the path of a file
    is_reference = rest[0] == "refs" and len(rest) >= 3  # three parts: refs/pr/1
    return "/".join(rest[:3]) if is_reference else rest[0]
