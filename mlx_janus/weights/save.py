"""Saving a model in memory as a converted folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import Dtype
from ..errors import OutputError
from ..models.janus import JanusModel
from ..processing.tokenizer import TOKENIZER_FILE
from .atomic_folder import atomic_folder
from .folder import check_output, make_stamp
from .safetensors_files import write_safetensors


def save_model(
    model: JanusModel,
    tokenizer: str,
    output: Path,
    *,
    dtype: Dtype,
    source: str,
    overwrite: bool = False,
) -> None:
    """Write a model in memory as a converted folder, atomically.

    Args:
        model: a model with float weights.
        tokenizer: the content of ``tokenizer.json``.
        output: the folder to create.
        dtype: type to store every weight in, including the codec's.
        source: origin of the model, recorded in the weight file.
        overwrite: whether to replace ``output`` if it is a converted folder already.

    Raises:
        OutputError: the output must not be replaced, or cannot be written.
    """
    check_output(output, overwrite=overwrite)
    arrays = {
        name: array.astype(getattr(mx, dtype)) for name, array in tree_flatten(model.parameters())
    }
    with atomic_folder(output, overwrite=overwrite) as folder:
        try:
            stamp = make_stamp(source, "", dtype, {})  # no revision and no file hashes
            write_safetensors(folder / "model.safetensors", arrays, stamp)
            (folder / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
            replace(model.config, dtype=dtype).dump(folder / "config.json")
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{output} cannot be written ({reason}): free some space") from None
