"""Models on the Hugging Face Hub: find one, read its config, download the files it needs.

Files are stored in the Hub's own cache, which other tools share. huggingface_hub shows the progress
bars and keeps every complete file, so an interrupted download resumes when it is run again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..config import read_model_json
from ..errors import CheckpointError, ConfigError, HubError, OutputError
from ..files import read_bounded, write_atomically
from .hub_errors import EXAMPLES, OutOfReachError, translated_errors, why_unreachable
from .weight_names import WEIGHT_FORMS, shards_without_index

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
"""Pattern of owner/name, for ``fullmatch``."""

_TIMEOUT = 10.0  # seconds without a response until the cache is used instead

# Names of the config, the tokenizer and the templates, and of indices of weights.
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
    # SHA-256 of the large files, by file name. Small files have none on the Hub.
    hashes: dict[str, str] = field(default_factory=dict, compare=False)


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
        raise HubError(f"{repo_id[:200]!r} is no Hub id: it must read owner/name ({EXAMPLES})")
    from huggingface_hub import HfApi

    try:
        with translated_errors(repo_id, revision):
            info = HfApi().model_info(
                repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT
            )
    except OutOfReachError:
        if cached := _find_cached(repo_id, revision):
            return cached
        raise
    if info.sha is None:
        raise HubError(f"the Hub gave no commit of {repo_id}: try again later")
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs}
    # The branch is recorded for offline use. A commit needs no record.
    branch = None if revision == info.sha else revision or "main"
    return HubModel(repo_id, info.sha, files, branch=branch, hashes=hashes)


def fetch_config(model: HubModel) -> Path:
    """Download ``config.json`` and return its path.

    The caller can then refuse a wrong model before its weights are downloaded.

    Raises:
        ConfigError: the repository has no ``config.json``.
        HubError: no access, or out of reach.
        OutputError: the cache cannot be written.
    """
    if "config.json" not in model.files:
        raise ConfigError(f"{model.repo_id} has no config.json: name a Janus model ({EXAMPLES})")
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
    weights, index = weight_names(model)
    wanted = sorted(weights | _small_files(model) | ({index} if index else set()))
    if not model.cached:
        _check_disk(model, wanted)
    folder = _fetch_files(model, wanted)
    record_branch(model)
    return folder


def fetch_small_files(model: HubModel) -> Path:
    """Download a model's config, tokenizer and prompts; return the folder that holds them.

    Raises:
        HubError: no access, the download broke off, or the Hub is out of reach and the cache lacks
            a file.
        OutputError: the disk is full, or the cache cannot be written.
    """
    return _fetch_files(model, sorted(_small_files(model)))


def has_blobs(model: HubModel, names: Iterable[str]) -> bool:
    """Return whether the cache has all of these large files, downloaded for any commit.

    Args:
        model: a commit.
        names: names of its files. A file whose hash is not known counts as missing.
    """
    blobs = _repo_folder(model.repo_id) / "blobs"
    hashes = [model.hashes.get(name) for name in names]
    return all(digest is not None and (blobs / digest).is_file() for digest in hashes)


def _repo_folder(repo_id: str) -> Path:
    """Return the folder of a model in the cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def _small_files(model: HubModel) -> set[str]:
    """Return the names of a model's text files, without any index of weights.

    ``fetch`` adds the index of the weights that it downloads. Another index, such as that of the
    ``.bin`` files next to safetensors files, would list files that are missing.
    """
    texts = {name for name in model.files if _TEXT_FILE_NAME.fullmatch(name)}
    return {name for name in texts if not name.endswith(".index.json")}


def _fetch_files(model: HubModel, names: list[str]) -> Path:
    """Download files of a model, or find them in the cache if ``model.cached``.

    Returns:
        The folder that holds them.

    Raises:
        HubError: no access, the Hub is out of reach, or the download broke off.
        OutputError: the disk is full, or the cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    with translated_errors(model.repo_id, model.revision):
        return Path(
            snapshot_download(
                model.repo_id,
                revision=model.revision,
                allow_patterns=names,
                local_files_only=model.cached,
            )
        )


def fetch_card(repo_id: str, revision: str) -> Path | None:
    """Download the model card of a commit, ``README.md``; return its path, or None on failure."""
    from huggingface_hub import hf_hub_download

    try:
        with translated_errors(repo_id, revision):
            return Path(hf_hub_download(repo_id, "README.md", revision=revision))
    except (HubError, OutputError):
        return None


def record_branch(model: HubModel) -> None:
    """Record in the cache which commit a branch names, for offline use.

    huggingface_hub does not record a branch when it downloads a commit. Call this only if the
    commit is completely downloaded or already converted, since ``find`` returns the recorded commit
    when the Hub is out of reach.
    """
    if model.branch is None or model.cached:
        return
    record = _repo_folder(model.repo_id) / "refs" / model.branch
    with suppress(OSError):  # a cache may be read-only
        if record.is_file() and read_bounded(record, 200) == model.revision.encode():
            return
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, model.revision)


def _fetch_file(model: HubModel, name: str) -> Path:
    """Download a file of a model, or find it in the cache if ``model.cached``; return its path.

    Raises:
        HubError: no access, the Hub is out of reach, or the download broke off.
        OutputError: the disk is full, or the cache cannot be written.
    """
    from huggingface_hub import hf_hub_download

    with translated_errors(model.repo_id, model.revision):
        return Path(
            hf_hub_download(
                model.repo_id, name, revision=model.revision, local_files_only=model.cached
            )
        )


def weight_names(model: HubModel) -> tuple[set[str], str | None]:
    """Return the names of a model's weight files, and the name of their index.

    The index is downloaded, because it lists the weight files. The second value is None if there is
    no index: for a single weight file, and for shards without one.

    Raises:
        CheckpointError: there are no weights, or the index is empty or lists a missing file.
        ConfigError: the index is not a JSON object.
        HubError: the index cannot be downloaded, or the Hub is out of reach and the cache lacks a
            weight file.
    """
    for index, single in WEIGHT_FORMS:
        if index in model.files:
            weight_map = read_model_json(_fetch_file(model, index)).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(
                    f"{index} of {model.repo_id} has no weight_map: name another model or revision"
                )
            names = set(map(str, weight_map.values()))
            missing = sorted(names - set(model.files))
            if not missing:
                return names, index
            if single not in model.files:
                raise _missing_weights_error(
                    model, f"lacks {missing[0][:80]}, which its {index} lists"
                )
        if single in model.files:
            return {single}, None
    try:
        shards = shards_without_index(model.files)
    except CheckpointError as error:
        raise _missing_weights_error(model, str(error)) from None
    if not shards:
        raise _missing_weights_error(
            model, "has neither model.safetensors nor pytorch_model.bin, nor an index of either"
        )
    return set(shards), None


def _missing_weights_error(model: HubModel, predicate: str) -> HubError | CheckpointError:
    """Return the error of missing weights, for the caller to raise.

    Args:
        model: the model.
        predicate: the rest of a sentence about the model, such as "lacks x.bin".
    """
    if model.cached:  # the Hub may have the files that the cache lacks
        return HubError(
            f"the cache holds only a part of {model.repo_id} and {why_unreachable()}: "
            "run the same again when online"
        )
    return CheckpointError(
        f"{model.repo_id} {predicate}: name another model or revision ({EXAMPLES})"
    )


def _find_cached(repo_id: str, revision: str | None) -> HubModel | None:
    """Return the commit in the cache that a revision names, or None if there is none.

    Its ``files`` are only those in the cache. Other files of the commit may be missing there.
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
    paths = [path for path in snapshot.iterdir() if path.is_file()]
    files = {path.name: path.stat().st_size for path in paths}
    # Each file is a link to a blob. The blob's name is the SHA-256 of a large file (64 digits),
    # and the SHA-1 of a small one.
    blobs = {path.name: path.resolve().name for path in paths}
    hashes = {name: blob for name, blob in blobs.items() if re.fullmatch(r"[0-9a-f]{64}", blob)}
    commit = snapshot.name
    return HubModel(repo_id, commit, files, cached=True, hashes=hashes)


def _check_disk(model: HubModel, names: list[str]) -> None:
    """Refuse a download that does not fit on the disk.

    A file counts as downloaded if the cache has a complete file of the same size, because a
    model's commits share their unchanged files.

    Raises:
        OutputError: the free space is too small.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    blobs = (_repo_folder(model.repo_id) / "blobs").glob("*")
    complete = [p for p in blobs if p.suffix != ".incomplete" and p.is_file()]
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
