"""An assembler of PyTorch checkpoints, pickles and zips, without torch."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def numbers(values: Iterable[int]) -> bytes:
    return tuple_of(*map(number, values))


def name_of(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def storage(key: str, kind: str, size: int) -> bytes:
    return (
        tuple_of(text("storage"), name_of(f"torch.{kind}"), text(key), text("cpu"), number(size))
        + b"Q"
    )


ORDERED_DICT = name_of("collections.OrderedDict") + b")R"


def tensor(
    place: bytes,
    shape: Iterable[int],
    strides: Iterable[int],
    offset: int = 0,
    tail: bytes = b"\x89" + ORDERED_DICT,
) -> bytes:
    arguments = tuple_of(place, number(offset), numbers(shape), numbers(strides), tail)
    return name_of("torch._utils._rebuild_tensor_v2") + arguments + b"R"


def parameter(inner: bytes) -> bytes:
    return (
        name_of("torch._utils._rebuild_parameter") + tuple_of(inner, b"\x88", ORDERED_DICT) + b"R"
    )


def pickled(entries: dict[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u."


ONE = {"w": tensor(storage("0", "FloatStorage", 4), (4,), (1,))}
DATA = np.arange(4, dtype=np.float32).tobytes()


def write(
    path: Path,
    program: bytes,
    storages: dict[str, bytes] | None = None,
    *,
    byteorder: bytes | None = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/.format_version", "1")
        if byteorder is not None:
            archive.writestr("archive/byteorder", byteorder)
        for key, content in ({"0": DATA} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/.data/serialization_id", "0" * 40)
    return path
