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
# Parts of an address that are followed by a revision.
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
        The rest of the name as it is, if it is not understood. The revision is None if the name has
        none.

    Raises:
        CheckpointError: the name is the address of anything but a model on the Hub, or ends in "@".
    """
    if address := _read_address(text):
        return address
    parts = text.split("/")
    if len(parts) >= 4 and parts[2] in _BEFORE_REVISION:  # an address without its host
        return "/".join(parts[:2]), _revision_in(parts[2:])
    text = text.rstrip("/") or text
    base, at, revision = text.partition("@")
    if at and not revision:
        raise CheckpointError(f"{text[:200]} names no revision after the @: leave the @ out")
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
    if match := re.fullmatch(r"git@([\w.-]+):(.+)", text):
        text = f"ssh://{match[1]}/{match[2]}"
    first_part = text.split("/")[0].lower()
    if "://" not in text and first_part in _HUB_HOSTS:
        text = f"https://{text}"
    if "://" not in text:
        return None
    try:
        address = urlsplit(text)
        host = (address.hostname or "").lower()
    except ValueError:  # such as an unclosed bracket
        host = ""
    if host not in _HUB_HOSTS | _own_hub():
        # The address may hold a password, so that only its host is shown.
        raise CheckpointError(
            f"the address at {host[:80] or 'no host'} is not a model's on the Hub: {NO_MODEL}"
        )
    parts = [unquote(part) for part in address.path.split("/") if part]
    if parts[:2] == ["api", "models"]:
        parts = parts[2:]
    return _checked_id(parts[:2], host), _revision_in(parts[2:])


def _own_hub() -> set[str]:
    """Return the host of ``HF_ENDPOINT``, if it names one."""
    from huggingface_hub import constants

    return {urlsplit(constants.ENDPOINT).hostname or ""} - {""}


def _checked_id(parts: list[str], shown: str) -> str:
    """Return the Hub id of the first two parts of an address's path.

    Raises:
        CheckpointError: they are not the owner and the name of a model.
    """
    kind = _OTHER_REPOSITORIES.get(parts[0]) if parts else None
    repo_id = "/".join(parts).removesuffix(".git")
    if kind or not HUB_ID.fullmatch(repo_id):
        problem = f"is of {kind}" if kind else "names no owner and model"
        raise CheckpointError(f"the address at {shown[:80]} {problem}: {NO_MODEL}")
    return repo_id


def _revision_in(parts: list[str]) -> str | None:
    """Return the revision in the rest of an address's path, such as tree/main; None without one."""
    if len(parts) < 2 or parts[0] not in _BEFORE_REVISION:
        return None
    is_reference = parts[1] == "refs" and len(parts) >= 4  # refs/pr/1
    return "/".join(parts[1:4]) if is_reference else parts[1]
