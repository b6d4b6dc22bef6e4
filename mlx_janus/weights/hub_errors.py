"""The errors of huggingface_hub, translated into one line with a fix."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import HubError, OutputError

EXAMPLES = "deepseek-ai/Janus-Pro-1B, deepseek-ai/Janus-Pro-7B and deepseek-ai/Janus-1.3B are there"
_LOG_IN = "run `hf auth login` with an account that may read it"


class OutOfReachError(HubError):
    """The Hub did not respond, or cannot respond now. The cache may hold the model."""


def why_unreachable() -> str:
    """Return the reason why the Hub is out of reach, as a part of an error message."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"{constants.ENDPOINT} cannot be reached"


@contextmanager
def translated_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of huggingface_hub into a HubError or OutputError, of one line with a fix."""
    from huggingface_hub import constants, errors

    # Base class of network errors: httpx's in huggingface_hub 1, httpx2's in 2.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    model_name = f"{repo_id} at {revision}" if revision else repo_id
    try:  # subclasses of errors come before their bases
        yield
    except errors.GatedRepoError as error:
        terms = f"{constants.ENDPOINT}/{repo_id}"
        fix = f"accept its terms at {terms}, then {_LOG_IN}"
        raise HubError(f"{repo_id} is gated: {fix}") from error
    except errors.RepositoryNotFoundError as error:
        fix = f"check the name ({EXAMPLES}); if it is private, {_LOG_IN}"
        raise HubError(f"the Hub shows no model {repo_id}: {fix}") from error
    except errors.RevisionNotFoundError as error:
        fix = "leave it out, or name a branch, tag or commit"
        raise HubError(f"{repo_id} has no revision {revision!r}: {fix}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        online_fix = "check the connection and run the same again"
        fix = "unset it to download" if constants.HF_HUB_OFFLINE else online_fix
        raise OutOfReachError(
            f"{model_name} is not in the cache and {why_unreachable()}: {fix}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(
            f"a file of {model_name} is gone from the Hub: "
            f"run the same again ({_first_line(error)})"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _http_error(model_name, error.response.status_code) from error
    except HTTPError as error:
        raise OutOfReachError(
            f"{model_name}: {why_unreachable()} ({_first_line(error)}): "
            "check the connection and run the same again"
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is no Hub id: it must read owner/name ({EXAMPLES})") from error
    except OSError as error:
        raise _disk_error(model_name, error, constants.HF_HUB_CACHE) from error
    except (RuntimeError, ValueError) as error:  # failures of hf_xet, and replies that are not JSON
        raise HubError(
            f"{model_name}: the download broke off ({_first_line(error)}): run the same again"
        ) from error


def _http_error(model_name: str, status: int) -> HubError:
    """Return the error of a failed request, by its HTTP status.

    A temporary failure gives an ``OutOfReachError``, after which ``hub.find`` tries the cache.
    """
    if status in (401, 403):
        return HubError(
            f"the Hub refused {model_name} (HTTP {status}): {_LOG_IN}, "
            "or unset HF_TOKEN if it is an old one"
        )
    if status == 429 or status >= 500:
        return OutOfReachError(
            f"the Hub cannot give {model_name} now (HTTP {status}): run the same again later"
        )
    return HubError(
        f"the Hub refused {model_name} (HTTP {status}): check the name and the revision"
    )


def _disk_error(model_name: str, error: OSError, cache: str) -> HubError | OutputError:
    """Return the error of a full disk, of a forbidden write, or else of a broken download."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"the disk of {cache} is full: "
            f"free some for {model_name}, or set HF_HOME to a larger disk"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return OutputError(
            f"{cache} cannot be written ({error.strerror}): set HF_HOME to a folder that can be"
        )
    return HubError(
        f"{model_name}: the download broke off ({_first_line(error)}): run the same again"
    )


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type if it has no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
