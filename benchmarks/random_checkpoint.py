"""Write a model folder with random weights: ``python benchmarks/random_checkpoint.py OUTPUT``.

Every file, name, shape and dtype is that of the published repository, so conversion, loading, speed
and memory can be tried at real size without the published weights. The values keep activations of
order 1; answers and images of such a model mean nothing. ``--model tiny`` takes a second.

The script needs neither torch nor much memory: it makes weights in blocks of 8 MiB and streams them
into the file. Only a tensor's name seeds it (``tensor_bits`` makes any one of them again), and both
layouts hold the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

from benchmarks.published_files import (
    write_deepseek_files,
    write_json,
    write_tokenizer,
    write_transformers_files,
)
from benchmarks.published_shapes import (
    MODELS,
    Model,
    Tensor,
    deepseek_tensors,
    transformers_tensors,
)

BLOCK = 1 << 22  # normals drawn for one tensor; a larger tensor repeats them, rolled
ROLL = 1_000_003  # odd and prime: two rows of a repeated block never coincide
MAX_SHARD = 10_000_000_000  # bytes; transformers' "10GB", its default for the published models


# ---- values --------------------------------------------------------------------------------------


def _block(tensor: Tensor, seed: int) -> np.ndarray:
    """Return the first ``BLOCK`` values of a tensor, or all of fewer, as the bits of bfloat16."""
    digest = hashlib.sha256(tensor.name.encode()).digest()
    random = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    values = random.standard_normal(min(tensor.count, BLOCK), dtype=np.float32)
    values *= np.float32(tensor.std)
    values += np.float32(tensor.mean)
    bits = values.view(np.uint32)
    # The upper 16 bits of a float32 are a bfloat16. This rounds to the nearest, ties to even.
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16)


def tensor_chunks(tensor: Tensor, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield the values of a tensor in order: uint16 arrays of the bits of bf16."""
    if tensor.of is not None:
        if tensor.of.count == tensor.count:
            yield from tensor_chunks(tensor.of, seed)
        else:
            start = tensor.part * tensor.count
            yield tensor_bits(tensor.of, seed).reshape(-1)[start : start + tensor.count]
        return
    block = _block(tensor, seed)
    left = tensor.count  # values still to yield
    shift = 0
    while left:
        for piece in (block[shift:], block[:shift]):  # the block, rolled by ``shift``
            piece = piece[:left]
            left -= piece.size
            if piece.size:
                yield piece
        shift = (shift + ROLL) % block.size


def tensor_bits(tensor: Tensor, seed: int = 0) -> np.ndarray:
    """Return a complete tensor as uint16 bits of bf16, in its shape."""
    return np.concatenate(list(tensor_chunks(tensor, seed))).reshape(tensor.shape)


# ---- weight files --------------------------------------------------------------------------------

Progress = Callable[[int], Any]  # receives the bytes written


def write_safetensors(path: Path, tensors: Iterable[Tensor], seed: int, progress: Progress) -> None:
    """Write a safetensors file with sorted tensors, as the safetensors library does."""
    ordered = sorted(tensors, key=lambda t: t.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in ordered:
        header[t.name] = {"dtype": "BF16", "shape": t.shape, "data_offsets": [end, end + t.bytes]}
        end += t.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in ordered:
            for chunk in tensor_chunks(t, seed):
                file.write(chunk)
                progress(chunk.nbytes)


class _Pickle:
    """Python's pickle (protocol 2) of ``{name: bf16 tensor}``, including memo numbers."""

    def __init__(self) -> None:
        self.code = bytearray(b"\x80\x02}")
        self.memo: dict[str, int] = {}
        self.puts = 0
        self._put()

    def state_dict(self, tensors: list[Tensor]) -> bytes:
        """Return the pickle of all tensors."""
        for start in range(0, len(tensors), 1000):  # the pickler's batch size
            self.code += b"("
            for key, tensor in enumerate(tensors[start : start + 1000], start):
                self._string(tensor.name)
                self._tensor(tensor, str(key))
            self.code += b"u"
        return bytes(self.code + b".")

    def _tensor(self, tensor: Tensor, key: str) -> None:
        """Write a tensor: a call of torch's function with its storage, offset, shape and strides.

        Args:
            tensor: the tensor.
            key: the name of its storage, an entry of the zip file.
        """
        self._remembered("storage function", b"ctorch._utils\n_rebuild_tensor_v2\n")
        self.code += b"(("
        self._remembered("storage", _string("storage"))
        self._remembered("storage class", b"ctorch\nBFloat16Storage\n")
        self._string(key)
        self._remembered("cpu", _string("cpu"))
        self.code += _integer(tensor.count) + b"t"
        self._put()
        self.code += b"Q" + _integer(0)  # the storage by its persistent id, offset 0
        self._tuple(tensor.shape)
        self._tuple(tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))))
        self.code += b"\x89"  # requires_grad False, then empty hooks
        self._remembered("dict class", b"ccollections\nOrderedDict\n")
        self.code += b")R"
        self._put()
        self.code += b"t"
        self._put()
        self.code += b"R"
        self._put()

    def _tuple(self, items: tuple[int, ...]) -> None:
        """Write a tuple of integers, and put it into the memo."""
        body = b"".join(map(_integer, items))
        short = {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(items))
        self.code += body + short if short else b"(" + body + b"t"
        self._put()

    def _string(self, text: str) -> None:
        """Write a string, and put it into the memo."""
        self.code += _string(text)
        self._put()

    def _put(self) -> None:
        """Put the last value into the memo under the next number."""
        short = self.puts < 256
        self.code += struct.pack("<cB" if short else "<cI", b"q" if short else b"r", self.puts)
        self.puts += 1

    def _remembered(self, what: str, code: bytes) -> None:
        """Write a value the first time, and later its number in the memo.

        All such values are in the first tensor, so their numbers are below 256: one byte.

        Args:
            what: a name of the value.
            code: the pickle of the value.
        """
        if what in self.memo:
            self.code += b"h" + struct.pack("<B", self.memo[what])
            return
        self.memo[what] = self.puts
        self.code += code
        self._put()


def _string(text: str) -> bytes:
    """Return the pickle of a string, without a memo number."""
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    """Return the shortest pickle of an integer of 0 or more."""
    if value < 1 << 8:
        return b"K" + struct.pack("<B", value)
    if value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    return b"J" + struct.pack("<i", value)


def _write_torch(path: Path, tensors: list[Tensor], seed: int, progress: Progress) -> None:
    """Write a ``.bin`` file as ``torch.save`` does: a zip of stored, 64-byte aligned entries."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def entry(name: str, size: int, chunks: Iterable[Any]) -> None:
            """Write an entry of ``size`` bytes, whose data begin at a multiple of 64."""
            info = zipfile.ZipInfo(f"{path.stem}/{name}")
            info.file_size = size
            zip64 = size > 1 << 30
            head = file.tell() + 30 + len(info.filename.encode()) + 4 + (20 if zip64 else 0)
            padding = -head % 64
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # as torch pads
            with archive.open(info, "w", force_zip64=zip64) as out:
                for chunk in chunks:
                    out.write(chunk)
            # The padding belongs before the data, and not into the directory of the zip file.
            info.extra = b""

        def data(tensor: Tensor) -> Iterator[np.ndarray]:
            """Yield the values of a tensor in chunks, and report each as written."""
            for chunk in tensor_chunks(tensor, seed):
                yield chunk
                progress(chunk.nbytes)

        for name, text in (("data.pkl", _Pickle().state_dict(tensors)), ("byteorder", b"little")):
            entry(name, len(text), [text])
        for key, tensor in enumerate(tensors):
            entry(f"data/{key}", tensor.bytes, data(tensor))
        entry("version", 2, [b"3\n"])


def _shards(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Split tensors in order into files of at most ``MAX_SHARD`` bytes."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size + tensor.bytes > MAX_SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _write_weights(folder: Path, model: Model, layout: str, seed: int, progress: Progress) -> None:
    """Write the weight files of a model and, if there are several, their index."""
    if layout == "transformers":
        write_safetensors(
            folder / "model.safetensors", transformers_tensors(model.sizes), seed, progress
        )
        return
    tensors = list(deepseek_tensors(model.sizes))
    if model.safetensors:
        write_safetensors(folder / "model.safetensors", tensors, seed, progress)
        return
    shards = _shards(tensors)
    if len(shards) == 1:
        _write_torch(folder / "pytorch_model.bin", tensors, seed, progress)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"pytorch_model-{i:05d}-of-{len(shards):05d}.bin"
        _write_torch(folder / name, shard, seed, progress)
        weight_map.update({tensor.name: name for tensor in shard})
    index = {"metadata": {"total_size": sum(t.bytes for t in tensors)}, "weight_map": weight_map}
    write_json(folder / "pytorch_model.bin.index.json", index)


# ---- the folder ----------------------------------------------------------------------------------


def checkpoint_tensors(model: str = "tiny", layout: str = "deepseek") -> list[Tensor]:
    """Return every tensor that ``write_checkpoint`` writes for a model in a layout.

    Raises:
        ValueError: there is no such model, or not in that layout.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    if layout not in MODELS[model].layouts:
        raise ValueError(
            f"layout of {model} must be {' or '.join(MODELS[model].layouts)}, got {layout!r}"
        )
    tensors = transformers_tensors if layout == "transformers" else deepseek_tensors
    return list(tensors(MODELS[model].sizes))


def write_checkpoint(
    output: str | Path,
    model: str = "tiny",
    *,
    layout: str = "deepseek",
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write a model folder with random weights, completely or not at all.

    Args:
        output: the new folder; it must not exist.
        model: "1b" (4.2 GB), "1.3b" (4.2 GB), "7b" (14.8 GB) or "tiny" (3 MB).
        layout: "deepseek", or "transformers" for "1b" and "tiny".
        seed: 0 or more; the same seed gives the same weights.
        progress: show a progress line on stderr.

    Raises:
        FileExistsError: ``output`` exists.
        OSError: it cannot be written, or the disk is too full.
        ValueError: there is no such model, or not in that layout; a negative seed.
    """
    from tqdm import tqdm

    tensors = checkpoint_tensors(model, layout)
    total = sum(t.bytes for t in tensors)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    output = Path(output).absolute()
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists: name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < total * 1.01:
        raise OSError(
            f"{output.parent} has {free / 1e9:.1f} GB left, and {model} takes {total / 1e9:.1f} GB"
        )
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        ids = write_tokenizer(partial / "tokenizer.json", MODELS[model], layout)
        if layout == "transformers":
            write_transformers_files(partial, MODELS[model], ids)
        else:
            write_deepseek_files(partial, MODELS[model])
        with tqdm(
            total=total, unit="B", unit_scale=True, desc=output.name, disable=not progress
        ) as bar:
            _write_weights(partial, MODELS[model], layout, seed, bar.update)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return output


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--model",
    type=click.Choice(list(MODELS)),
    default="tiny",
    show_default=True,
    help="Published shape.",
)
@click.option(
    "--layout",
    type=click.Choice(["deepseek", "transformers"]),
    default="deepseek",
    show_default=True,
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(output: Path, model: str, layout: str, seed: int) -> None:
    """Write OUTPUT, a model folder in a published form with random weights.

    tiny takes 3 MB, 1b 4.2 GB, 7b 14.8 GB.
    """
    try:
        click.echo(write_checkpoint(output, model, layout=layout, seed=seed, progress=True))
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
