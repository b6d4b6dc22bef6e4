"""A checkup of a model folder: all of its faults, and not only the first one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..config import JanusConfig
from ..errors import CheckpointError, JanusError
from ..processing.tokenizer import TOKENIZER_FILE, prepare_tokenizer
from .convert import ConvertOptions, Source, plan_conversion
from .folder import is_converted
from .load import read_model
from .published import read_published_config, read_published_sizes
from .safetensors_files import find_weights


def find_faults(folder: Path, *, headers: bool = False) -> list[str]:
    """Return a message for each fault that keeps a model folder from being loaded.

    Args:
        folder: a converted folder, or a PyTorch model folder.
        headers: whether to read the headers of the weight files and the tokenizer too. They are
            read only if the quick checks, of the config and the file names, find no fault.

    Returns:
        An empty list if no fault is found. A damaged value inside a tensor is never found.
    """
    checks: list[Callable[[Path], object]] = [_check_config, _check_tokenizer, find_weights]
    faults = _run_checks(checks, folder)
    if headers and not faults:
        faults = _run_checks([_check_headers], folder)
    return faults


def _run_checks(checks: list[Callable[[Path], object]], folder: Path) -> list[str]:
    """Run checks on a folder, and return the messages of their errors without repetitions."""
    messages: dict[str, None] = {}  # an ordered set
    for check in checks:
        try:
            check(folder)
        except JanusError as error:
            messages[str(error)] = None
        except OSError as error:
            messages[f"{folder} cannot be read ({error.strerror})"] = None
    return list(messages)


def read_sizes(folder: Path) -> JanusConfig:
    """Read the ``config.json`` of a converted folder or a PyTorch model folder.

    Other files may be missing.

    Raises:
        ConfigError, UnsupportedModelError: the config cannot be used.
    """
    path = folder / "config.json"
    return JanusConfig.load(path) if is_converted(folder) else read_published_sizes(path)[0]


def _check_config(folder: Path) -> None:
    """Check a folder's config. In a PyTorch model folder, several files hold parts of it.

    Raises:
        ConfigError, UnsupportedModelError: the config cannot be used.
    """
    if is_converted(folder):
        JanusConfig.load(folder / "config.json")
    else:
        read_published_config(folder)


def _check_tokenizer(folder: Path) -> None:
    """Check that a folder has a tokenizer.

    Raises:
        CheckpointError: it has none.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: download the whole model folder")


def _check_headers(folder: Path) -> None:
    """Check the tensors in the headers of the weight files, and the content of the tokenizer.

    Raises:
        JanusError: the tensors or the tokenizer do not fit the config, or a file is damaged.
    """
    if is_converted(folder):
        config = JanusConfig.load(folder / "config.json")
        read_model(folder, config)
    else:
        config = plan_conversion(Source(folder, folder.name), ConvertOptions()).config
    prepare_tokenizer(folder / TOKENIZER_FILE, config.prompt)
