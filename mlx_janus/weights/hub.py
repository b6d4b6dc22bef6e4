"""Models on the Hugging Face Hub: find one, read its config, download the files it needs.

Files are stored in the Hub's own cache, which other tools share. huggingface_hub shows the progress
bars and keeps every complete file, so an interrupted download resumes when it is run again.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..config import read_model_json
from ..errors import CheckpointError, ConfigError, HubError, OutputError
from ..files import write_atomically

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
"""Pattern of owner/name, for ``fullmatch``."""

_EXAMPLES = (
    "deepseek-ai/Janus-Pro-1B, deepseek-ai/Janus-Pro-7B and deepseek-ai/Janus-1.3B are there"
)
_LOG_IN = "run `hf auth login` with an account that may read it"
_TIMEOUT = 10.0  # seconds without a response until the cache is used instead

_TEXT_FILE_NAME = re.compile(r"[\w.-]+\.(json|jinja)|tokenizer\.model|vocab\.txt|merges\.txt")


@dataclass(frozen=True)
class HubModel:
    """One commit of a model repository.

    ``cached`` means that the Hub was out of reach: ``files`` are then the files in the cache, and
    no others can be downloaded.
    """

    repo_id: str
    revision: str  # commit sha
    files: dict[str, int]  # bytes by file name
    cached: bool = False
    branch: str | None = field(default=None, compare=False)  # branch or tag; None: record none


class _OutOfReachError(HubError):
    """The Hub did not respond, or cannot respond now. The cache may hold the model."""


def find(repo_id: str, revision: str | None = None) -> HubModel:
    """Find a model on the Hub, or in the cache if the Hub is out of reach.

    Args:
        repo_id: owner/name.
        revision: a branch, tag or commit; None: the branch main.

    Raises:
        HubError: no such model or revision, no access, or the Hub is out of reach and the model is
            not in the cache.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise HubError(f"{repo_id[:200]!r} is no Hub id: it must read owner/name ({_EXAMPLES})")
    from huggingface_hub import HfApi

    try:
        with _translated_errors(repo_id, revision):
            info = HfApi().model_info(
                repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT
            )
    except _OutOfReachError:
        if cached := _find_cached(repo_id, revision):
            return cached
        raise
    if info.sha is None:
        raise HubError(f"the Hub gave no commit of {repo_id}: try again later")
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    # The branch is recorded for offline use. A commit needs no record.
    branch = None if revision == info.sha else revision or "main"
    return HubModel(repo_id, info.sha, files, branch=branch)


def fetch_config(model: HubModel) -> Path:
    """Download ``config.json`` and return its path.

    The caller can then refuse a wrong model before its weights are downloaded.

    Raises:
        ConfigError: the repository has no ``config.json``.
        HubError: no access, or out of reach.
        OutputError: the cache cannot be written.
    """
    if "config.json" not in model.files:
        raise ConfigError(f"{model.repo_id} has no config.json: name a Janus model ({_EXAMPLES})")
    return _fetch_file(model, "config.json")


def fetch(model: HubModel) -> Path:
    """Download a model's config, tokenizer and weights; return the folder that holds them.

    Weights are downloaded in one form: safetensors if the repository has them, else ``.bin``.

    Raises:
        CheckpointError: the repository has no weights, or lacks a file that its index lists.
        ConfigError: the index of the weights is not a JSON object.
        HubError: no access, the download broke off, or the Hub is out of reach and the cache lacks
            a file.
        OutputError: the disk is full, or the cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    weights, index = _weight_names(model)
    texts = {name for name in model.files if _TEXT_FILE_NAME.fullmatch(name)}
    # Leave out every index, and then add the one that lists ``weights``. An index of another form
    # would list files that are not downloaded.
    texts = {name for name in texts if not name.endswith(".index.json")}
    wanted = sorted(weights | texts | ({index} if index else set()))
    if not model.cached:
        _check_disk(model, wanted)
    with _translated_errors(model.repo_id, model.revision):
        folder = snapshot_download(
            model.repo_id,
            revision=model.revision,
            allow_patterns=wanted,
            local_files_only=model.cached,
        )
    if model.branch and not model.cached:
        _record_branch(Path(folder), model.branch)
    return Path(folder)


def fetch_card(repo_id: str, revision: str) -> Path | None:
    """Download the model card of a commit, ``README.md``; return its path, or None on failure."""
    from huggingface_hub import hf_hub_download

    try:
        with _translated_errors(repo_id, revision):
            return Path(hf_hub_download(repo_id, "README.md", revision=revision))
    except (HubError, OutputError):
        return None


def _record_branch(snapshot: Path, branch: str) -> None:
    """Record in the cache which commit a branch names, for offline use.

    huggingface_hub does not record a branch when it downloads a commit. Call this only for a
    complete snapshot, since ``find`` returns the recorded commit when the Hub is out of reach.

    Args:
        snapshot: the commit's folder in the cache, ``<model>/snapshots/<commit>``.
        branch: a branch or tag.
    """
    record = snapshot.parent.parent / "refs" / branch
    with suppress(OSError):  # a cache may be read-only
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, snapshot.name)


def _fetch_file(model: HubModel, name: str) -> Path:
    """Download a file of a model, or find it in the cache if ``model.cached``; return its path.

    Raises:
        HubError: no access, the Hub is out of reach, or the download broke off.
        OutputError: the disk is full, or the cache cannot be written.
    """
    from huggingface_hub import hf_hub_download

    with _translated_errors(model.repo_id, model.revision):
        return Path(
            hf_hub_download(
                model.repo_id, name, revision=model.revision, local_files_only=model.cached
            )
        )


def _weight_names(model: HubModel) -> tuple[set[str], str | None]:
    """Return the names of a model's weight files, and the name of their index.

    The index is downloaded, because it lists the weight files. A single weight file has no index:
    then the second name is None.

    Raises:
        CheckpointError: there are no weights, or the index is empty or lists a missing file.
        ConfigError: the index is not a JSON object.
        HubError: the index cannot be downloaded, or the Hub is out of reach and the cache lacks a
            weight file.
    """
    # Importing this module imports MLX, which takes time. Commands check their options before.
    from .safetensors_files import WEIGHT_FORMS

    for index, single in WEIGHT_FORMS:
        if index in model.files:
            weight_map = read_model_json(_fetch_file(model, index)).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(
                    f"{index} of {model.repo_id} has no weight_map: name another model or revision"
                )
            names = set(map(str, weight_map.values()))
            if missing := sorted(names - set(model.files)):
                raise _missing_weights_error(
                    model, f"lacks {missing[0][:80]}, which its {index} lists"
                )
            return names, index
        if single in model.files:
            return {single}, None
    raise _missing_weights_error(
        model, "has neither model.safetensors nor pytorch_model.bin, nor an index of either"
    )


def _missing_weights_error(model: HubModel, predicate: str) -> HubError | CheckpointError:
    """Return the error of missing weights, for the caller to raise.

    Args:
        model: the model.
        predicate: the rest of a sentence about the model, such as "lacks x.bin".
    """
    if model.cached:  # the Hub may have the files that the cache lacks
        return HubError(
            f"the cache holds only a part of {model.repo_id} and {_why_unreachable()}: "
            "run the same again when online"
        )
    return CheckpointError(
        f"{model.repo_id} {predicate}: name another model or revision ({_EXAMPLES})"
    )


def _find_cached(repo_id: str, revision: str | None) -> HubModel | None:
    """Return the commit in the cache that a revision names, or None if there is none.

    The commit's ``files`` are those in the cache, which may lack some of them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # With ``local_files_only``, this finds the commit's folder without a download.
        snapshot = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns="config.json", local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None
    files = {path.name: path.stat().st_size for path in snapshot.iterdir() if path.is_file()}
    commit = snapshot.name
    return HubModel(repo_id, commit, files, cached=True)


def _check_disk(model: HubModel, names: list[str]) -> None:
    """Refuse a download that does not fit on the disk.

    A file counts as downloaded if the cache has a complete file of the same size, because a
    model's commits share their unchanged files.

    Raises:
        OutputError: the free space is too small.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / f"models--{model.repo_id.replace('/', '--')}" / "blobs"
    complete = [p for p in blobs.glob("*") if p.suffix != ".incomplete" and p.is_file()]
    cached_sizes = {path.stat().st_size for path in complete}
    sizes = [model.files[name] for name in names]
    needed = sum(size for size in sizes if size not in cached_sizes)
    # Before the first download the cache does not exist, so ask for the nearest folder above it.
    folder = next((p for p in (cache, *cache.parents) if p.exists()), cache)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # the free space is unknown, so try the download
        return
    if needed > free:
        raise OutputError(
            f"{model.repo_id} needs {needed / 1e9:.2f} GB more in {cache}, "
            f"where {free / 1e9:.2f} GB are free: "
            "free some, or set HF_HOME to a folder on a larger disk"
        )


def _why_unreachable() -> str:
    """Return the reason why the Hub is out of reach, as a part of an error message."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"{constants.ENDPOINT} cannot be reached"


@contextmanager
def _translated_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of huggingface_hub into a HubError or OutputError, of one line with a fix."""
    # The except clauses below name subclasses before their bases.
    from huggingface_hub import constants, errors

    # Base class of network errors: httpx's in huggingface_hub 1, httpx2's in 2.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    model_name = f"{repo_id} at {revision}" if revision else repo_id
    try:
        yield
    except errors.GatedRepoError as error:
        terms = f"{constants.ENDPOINT}/{repo_id}"
        fix = f"accept its terms at {terms}, then {_LOG_IN}"
        raise HubError(f"{repo_id} is gated: {fix}") from error
    except errors.RepositoryNotFoundError as error:
        fix = f"check the name ({_EXAMPLES}); if it is private, {_LOG_IN}"
        raise HubError(f"the Hub shows no model {repo_id}: {fix}") from error
    except errors.RevisionNotFoundError as error:
        fix = "leave it out, or name a branch, tag or commit"
        raise HubError(f"{repo_id} has no revision {revision!r}: {fix}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        online_fix = "check the connection and run the same again"
        fix = "unset it to download" if constants.HF_HUB_OFFLINE else online_fix
        raise _OutOfReachError(
            f"{model_name} is not in the cache and {_why_unreachable()}: {fix}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(
            f"a file of {model_name} is gone from the Hub: "
            f"run the same again ({_first_line(error)})"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _http_error(model_name, error.response.status_code) from error
    except HTTPError as error:
        raise _OutOfReachError(
            f"{model_name}: {_why_unreachable()} ({_first_line(error)}): "
            "check the connection and run the same again"
        ) from error
    except errors.HFValidationError as error:
        raise HubError(
            f"{repo_id!r} is no Hub id: it must read owner/name ({_EXAMPLES})"
        ) from error
    except OSError as error:
        raise _disk_error(model_name, error, constants.HF_HUB_CACHE) from error
    except (RuntimeError, ValueError) as error:  # failures of hf_xet, and replies that are not JSON
        raise HubError(
            f"{model_name}: the download broke off ({_first_line(error)}): run the same again"
        ) from error


def _http_error(model_name: str, status: int) -> HubError:
    """Return the error of a failed request, by its HTTP status.

    A temporary failure gives an ``_OutOfReachError``, after which ``find`` tries the cache.
    """
    if status in (401, 403):
        return HubError(
            f"the Hub refused {model_name} (HTTP {status}): {_LOG_IN}, "
            "or unset HF_TOKEN if it is an old one"
        )
    if status == 429 or status >= 500:
        return _OutOfReachError(
            f"the Hub cannot give {model_name} now (HTTP {status}): run the same again later"
        )
    return HubError(
        f"the Hub refused {model_name} (HTTP {status}): check the name and the revision"
    )


def _disk_error(model_name: str, error: OSError, cache: str) -> HubError | OutputError:
    """Return the error of a cache that cannot be written, or else of a download that broke off."""
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
