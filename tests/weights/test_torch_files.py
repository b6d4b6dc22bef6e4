"""The reader of ``.bin`` files: exact values from legal files, one line of error from others."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_janus.errors import CheckpointError
from mlx_janus.weights import torch_files, torch_pickle
from mlx_janus.weights.torch_files import ChecksumReader, StoredTensor, read_range, read_torch_file
from tests.support.golden import FIXTURES
from tests.support.torch_checkpoints import (
    DATA,
    ONE,
    ORDERED_DICT,
    name_of,
    number,
    numbers,
    parameter,
    pickled,
    storage,
    tensor,
    text,
    tuple_of,
    write,
)

KINDS = {
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


def write_sparse(path: Path, program: bytes, size: int) -> Path:
    """Write a sparse file whose storage "0" has ``size`` bytes, all zero but the last four."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        entry = zipfile.ZipInfo("archive/data/0")
        entry.file_size = entry.compress_size = size
        entry.header_offset = entry.CRC = 0
        file.write(entry.FileHeader(zip64=True))
        leave_hole(file, size)
        archive.filelist.append(entry)
        archive.NameToInfo[entry.filename] = entry
        archive.start_dir = file.tell()
        archive.writestr("archive/data.pkl", program)
    return path


def leave_hole(file: BinaryIO, size: int) -> None:
    file.seek(size - 4, os.SEEK_CUR)
    file.write(struct.pack("<f", 7.0))


def patch_directory(path: Path, entry: str, **values: int) -> None:
    """Change fields of one entry in the zip's central directory."""
    fields = {"flags": (8, "<H"), "packed": (20, "<I"), "size": (24, "<I"), "local": (42, "<I")}
    content = bytearray(path.read_bytes())
    start = content.rindex(entry.encode()) - 46
    assert content[start : start + 4] == b"PK\x01\x02"
    for field, value in values.items():
        place, form = fields[field]
        struct.pack_into(form, content, start + place, value)
    path.write_bytes(content)


def refused(path: Path, *words: str) -> str:
    """Check that the file is refused with one line that names it and holds the words."""
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert [word for word in words if word not in message] == [], message
    return message


# Legal files


@pytest.mark.parametrize("shape", [(2, 3), (), (0,), (3, 0, 2), (1, 1, 1, 1, 1, 1, 1, 5)])
@pytest.mark.parametrize("dtype", KINDS)
def test_every_dtype_comes_back_bit_for_bit(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    wire = "uint16" if dtype == "bfloat16" else dtype
    values = np.random.default_rng(0).normal(0, 300, shape).astype(np.int64).astype(wire)
    place = storage("0", KINDS[dtype], values.size)
    strides = np.array(np.empty(shape, np.int8).strides, int) if values.size else [1] * len(shape)
    path = write(
        tmp_path / "m.bin", pickled({"w": tensor(place, shape, strides)}), {"0": values.tobytes()}
    )
    stored = read_torch_file(path)["w"]
    assert (stored.shape, stored.dtype, stored.nbytes) == (shape, dtype, values.nbytes)
    x = stored.read()
    assert x.shape == shape
    assert x.dtype == getattr(mx, {"bool": "bool_", "float64": "float32"}.get(dtype, dtype))
    if dtype == "bfloat16":
        x = x.view(mx.uint16)
    np.testing.assert_array_equal(np.array(x), values)


LAYOUTS = {
    "transposed": ((4, 6), (1, 4), 0),
    "columns": ((4, 2), (6, 3), 1),
    "rows from an offset": ((2, 6), (6, 1), 12),
    "channels last": ((1, 2, 3, 4), (24, 1, 8, 2), 0),
    "broadcast": ((3, 4), (0, 1), 20),
    "sliding windows": ((5, 4), (1, 1), 3),
    "last item": ((), (), 23),
    "a side of one with any stride": ((1, 4, 1), (2**62, 5, 2**40), 0),
    "empty beyond the end": ((0, 3), (3, 1), 24),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bool", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(tmp_path: Path, layout: str, dtype: str) -> None:
    shape, strides, offset = LAYOUTS[layout]
    base = (np.arange(24) % 7 if dtype != "bool" else np.arange(24) % 3 == 0).astype(
        "uint16" if dtype == "bfloat16" else dtype
    )
    program = pickled({"w": tensor(storage("0", KINDS[dtype], 24), shape, strides, offset)})
    x = read_torch_file(write(tmp_path / "m.bin", program, {"0": base.tobytes()}))["w"].read()
    if dtype == "bfloat16":
        x = x.view(mx.uint16)
    expected = [
        base[offset + sum(i * s for i, s in zip(index, strides, strict=True))]
        for index in np.ndindex(*shape)
    ]
    np.testing.assert_array_equal(np.array(x), np.array(expected).reshape(shape))


def test_two_tensors_in_one_storage_and_one_tensor_under_two_names(tmp_path: Path) -> None:
    place = storage("0", "FloatStorage", 4)
    entries = {
        "a": tensor(place, (2,), (1,)) + b"q\x01",
        "b": parameter(tensor(place, (2,), (1,), 2)),
        "tied": b"h\x01",
    }
    tensors = read_torch_file(write(tmp_path / "m.bin", pickled(entries)))
    assert list(tensors) == ["a", "b", "tied"]
    assert {name: stored.read().tolist() for name, stored in tensors.items()} == {
        "a": [0, 1],
        "b": [2, 3],
        "tied": [0, 1],
    }


def test_a_state_dict_with_metadata_is_an_ordered_dict_with_state(tmp_path: Path) -> None:
    # What torch writes for module.state_dict(): items, then BUILD with the module versions.
    metadata = (
        b"}"
        + text("_metadata")
        + ORDERED_DICT
        + text("")
        + b"}"
        + text("version")
        + number(1)
        + b"sss"
    )
    program = b"\x80\x02" + ORDERED_DICT + b"(" + text("w") + ONE["w"] + b"u" + metadata + b"b."
    assert read_torch_file(write(tmp_path / "m.bin", program))["w"].read().tolist() == [0, 1, 2, 3]


def test_protocol_4_and_a_file_from_before_byte_orders(tmp_path: Path) -> None:
    def short(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode() + b"\x94"

    call = short("torch._utils") + short("_rebuild_tensor_v2") + b"\x93\x94"
    kind = short("torch") + short("FloatStorage") + b"\x93"
    place = tuple_of(short("storage"), kind, short("0"), short("cpu"), b"K\x04") + b"Q"
    value = call + tuple_of(place, b"K\x00", b"K\x04\x85", b"K\x01\x85", b"\x89", b"}") + b"R"
    body = b"}\x94" + short("w") + value + b"s."
    program = b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body
    path = write(tmp_path / "m.bin", program, byteorder=None)
    assert read_torch_file(path)["w"].read().tolist() == [0, 1, 2, 3]


def test_zip64_storage_beyond_four_gibibytes(tmp_path: Path) -> None:
    size = (1 << 32) + 4096
    items = size // 4
    place = storage("0", "FloatStorage", items)
    program = pickled(
        {"end": tensor(place, (2,), (1,), items - 2), "far": tensor(place, (2,), (3,), items - 4)}
    )
    path = write_sparse(tmp_path / "m.bin", program, size)
    tensors = read_torch_file(path)
    assert tensors["end"].read().tolist() == [0, 7]
    assert tensors["far"].read().tolist() == [0, 7]


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
from mlx_janus.weights.torch_files import read_torch_file

def peak():
    if sys.platform == "linux":  # ru_maxrss would count the parent's memory too
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

tensors = read_torch_file(Path(sys.argv[1]))
tensors["small"].read()
before = peak()
x = tensors["large"].read()
assert x.shape == (150, 1 << 19) and x[-1, -1].item() == 7.0
print((peak() - before) / x.nbytes)
"""


def test_reading_takes_no_second_copy(tmp_path: Path) -> None:
    items = 150 << 19  # 300 MiB
    place = storage("0", "FloatStorage", items)
    entries = {
        "small": tensor(place, (2,), (1,)),
        "large": tensor(place, (150, 1 << 19), (1 << 19, 1)),
    }
    path = write_sparse(tmp_path / "m.bin", pickled(entries), items * 4)
    root = str(Path(torch_files.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(path)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.5 < float(done.stdout) < 1.2


def test_read_range(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(b"xyz" + np.arange(6, dtype=np.uint32).tobytes())
    assert read_range(path, 3, (2, 3), "uint32").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_range(path, 7, (), "uint64").item() == 1 + (2 << 32)
    assert read_range(path, 0, (0, 5), "float16").shape == (0, 5)
    with pytest.raises(CheckpointError, match="raw: ends 1 bytes too early"):
        read_range(path, 4, (6,), "uint32")


def test_arrays_outlive_the_file_and_own_their_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", pickled(ONE))
    stored = read_torch_file(path)["w"]
    first, second = stored.read(), stored.read()
    path.unlink()
    first[0] = 9
    assert (first.tolist(), second.tolist()) == ([9, 1, 2, 3], [0, 1, 2, 3])


def our_name(name: str) -> str | None:
    """Return the name in transformers' layout of a tensor with the same values and shape there."""
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.", 1)
    return None


def test_the_reference_shards() -> None:
    folder = FIXTURES / "deepseek-pro-bin"
    places = json.loads((folder / "pytorch_model.bin.index.json").read_text())["weight_map"]
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        part = read_torch_file(folder / shard)
        assert set(part) == {name for name, place in places.items() if place == shard}
        tensors |= part
    assert sum(not stored.contiguous for stored in tensors.values()) >= 10
    assert sum(stored.storage_offset > 0 for stored in tensors.values()) >= 5
    known: dict[str, mx.array] = mx.load(str(FIXTURES / "transformers" / "model.safetensors"))  # type: ignore[assignment]
    same_values = [v.view(mx.uint16) for v in known.values()]
    renamed = 0
    for name, stored in tensors.items():
        x = stored.read()
        assert (x.dtype, x.shape) == (mx.bfloat16, stored.shape)
        if ours := our_name(name):
            assert mx.array_equal(x.view(mx.uint16), known[ours].view(mx.uint16)), name
            renamed += 1
        elif (
            not stored.contiguous
            and ".qkv." not in name
            and "attn_pool" not in name
            and "pos_embed" not in name
        ):
            bits = x.view(mx.uint16)
            assert any(v.shape == bits.shape and mx.array_equal(v, bits) for v in same_values), name
    assert renamed >= 20


# Pickles that ask for more


def stack_name_of(dotted: str) -> bytes:
    """The name as STACK_GLOBAL takes it, split at the first dot: the rest is looked up in steps."""
    module, _, attributes = dotted.partition(".")
    return text(module) + text(attributes) + b"\x93"


def hostile_programs(marker: str) -> dict[str, tuple[str, bytes]]:
    """What makes a directory when unpickled, after the name that is asked for first."""

    def call(function: bytes, *arguments: bytes) -> bytes:
        return function + tuple_of(*arguments) + b"R"

    mkdir = f"__import__('os').mkdir({marker!r})"
    module = call(name_of("builtins.__import__"), text("os"))
    attribute = call(name_of("builtins.getattr"), module, text("mkdir"))
    state = b"}" + text("a") + call(name_of("os.mkdir"), text(marker)) + b"s"
    programs = {
        "eval": ("builtins.eval", call(name_of("builtins.eval"), text(mkdir))),
        "exec": ("builtins.exec", call(name_of("builtins.exec"), text(mkdir))),
        "os.system": ("os.system", call(name_of("os.system"), text(f"mkdir '{marker}'"))),
        "subprocess": (
            "subprocess.getoutput",
            call(name_of("subprocess.getoutput"), text(f"mkdir '{marker}'")),
        ),
        "getattr of an import": ("builtins.getattr", call(attribute, text(marker))),
        "partial": (
            "functools.partial",
            call(call(name_of("functools.partial"), name_of("os.mkdir")), text(marker)),
        ),
        "map": (
            "builtins.list",
            call(
                name_of("builtins.list"),
                call(name_of("builtins.map"), name_of("os.mkdir"), b"(" + text(marker) + b"t"),
            ),
        ),
        "pathlib": (
            "pathlib.Path.mkdir",
            call(stack_name_of("pathlib.Path.mkdir"), call(name_of("pathlib.Path"), text(marker))),
        ),
        "stack global": ("os.mkdir", call(stack_name_of("os.mkdir"), text(marker))),
        "inst": ("os.mkdir", b"(" + text(marker) + b"ios\nmkdir\n"),
        "obj": ("os.mkdir", b"(" + name_of("os.mkdir") + text(marker) + b"o"),
        "newobj": (
            "os.mkdir",
            call(name_of("os.mkdir"), name_of("builtins.str") + text(marker) + b"\x85\x81"),
        ),
        "state": ("os.mkdir", ORDERED_DICT + state + b"b"),
        "key": ("os.mkdir", b"}" + call(name_of("os.mkdir"), text(marker)) + b"Ns"),
        "discarded": ("os.mkdir", call(name_of("os.mkdir"), text(marker)) + b"0N"),
        "hidden in a tensor's hooks": (
            "os.mkdir",
            tensor(b"N", (4,), (1,), tail=b"\x89" + call(name_of("os.mkdir"), text(marker))),
        ),
    }
    return {
        title: (name, b"\x80\x04}(" + text("w") + value + b"u.")
        for title, (name, value) in programs.items()
    }


NOT_RUN_BY_PICKLE = {"hidden in a tensor's hooks"}  # for want of torch


@pytest.mark.parametrize("attack", hostile_programs(""))
def test_nothing_of_a_hostile_pickle_runs(tmp_path: Path, attack: str) -> None:
    marker = tmp_path / "marker"
    name, program = hostile_programs(str(marker))[attack]
    if (
        attack not in NOT_RUN_BY_PICKLE
    ):  # it works where it is let in, so the check below means something
        pickle.loads(program)
        marker.rmdir()
    refused(write(tmp_path / "m.bin", program), f"refused: the pickle asks for {name}: ")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.hub.load",
        "torch.storage._load_from_bytes",
        "torch.serialization.load",
        "torch.UntypedStorage",
        "torch._utils._rebuild_tensor_v3",
        "numpy.core.multiarray.scalar",
        "collections.defaultdict",
        "builtins.dict",
        "mlx_janus.weights.torch_files._make_tensor",
        "torch.FloatStorage.from_file",
        "torch.storage.TypedStorage",
    ],
)
@pytest.mark.parametrize("mention", [name_of, stack_name_of])
def test_a_name_outside_the_list_is_refused_where_it_stands(
    tmp_path: Path, mention: Any, name: str
) -> None:
    refused(
        write(tmp_path / "m.bin", pickled({"w": mention(name)})),
        f"refused: the pickle asks for {name}: ",
    )


def test_a_name_is_quoted_and_cut(tmp_path: Path) -> None:
    value = text("os") + text("a\nb\x1b[31m\ud800" + "x" * 5000) + b"\x93"
    message = refused(write(tmp_path / "m.bin", pickled({"w": value})), r"os.a\nb\x1b[31m\ud800xxx")
    assert len(message) < len(str(tmp_path)) + 250


PLACE = storage("0", "FloatStorage", 4)
STRANGE = {
    "calls a storage": (
        name_of("torch.FloatStorage") + b")R",
        "calls torch.FloatStorage with 0 arguments",
    ),
    "fills an ordered dict by call": (
        ORDERED_DICT[:-2] + b"]\x85R",
        "calls collections.OrderedDict with 1 arguments",
    ),
    "calls with too few": (name_of("torch._utils._rebuild_tensor_v2") + b")R", "with 0 arguments"),
    "makes an object": (
        name_of("collections.OrderedDict") + b")\x81",
        "uses the instruction NEWOBJ",
    ),
    "makes an object by keywords": (
        name_of("collections.OrderedDict") + b")}\x92",
        "uses the instruction NEWOBJ_EX",
    ),
    "extension": (b"\x82\x01", "uses the instruction EXT1"),
    "text persistent id": (b"Pstorage\n", "uses the instruction PERSID"),
    "text memo": (b"Np99999999999\n", "uses the instruction PUT"),
    "bytes": (b"C\x01a", "uses the instruction SHORT_BINBYTES"),
    "instance": (b"(icollections\nOrderedDict\n", "uses the instruction INST"),
    "pop": (b"N0", "uses the instruction POP"),
    "set": (b"\x8f", "uses the instruction EMPTY_SET"),
    "huge memo": (b"Nr\xff\xff\xff\xff", "numbers its memo up to 4294967295"),
    "id of four": (tuple_of(text("storage"), b"N", text("0"), text("cpu")) + b"Q", "unknown way"),
    "id of another word": (
        tuple_of(text("module"), b"N", text("0"), text("cpu"), b"K\x04") + b"Q",
        "unknown way",
    ),
    "id as text": (text("storage") + b"Q", "unknown way"),
    "id with no storage": (
        tuple_of(
            text("storage"), name_of("collections.OrderedDict"), text("0"), text("cpu"), b"K\x04"
        )
        + b"Q",
        "a storage of type collections.OrderedDict",
    ),
    "id of unknown storage": (
        storage("0", "ComplexFloatStorage", 4),
        "asks for torch.ComplexFloatStorage",
    ),
    "negated": (tensor(PLACE, (4,), (1,), tail=b"\x89}}" + text("neg") + b"\x88s"), "negated"),
}


@pytest.mark.parametrize("title", STRANGE)
def test_what_tensors_do_not_need_is_refused(tmp_path: Path, title: str) -> None:
    value, words = STRANGE[title]
    refused(write(tmp_path / "m.bin", pickled({"w": value})), "refused: the pickle ", words)


FUNCTION = name_of("torch._utils._rebuild_tensor_v2")
MALFORMED = {
    "state on a function": FUNCTION + b"}" + text("__kwdefaults__") + b"}sb",
    "state on a tensor": tensor(PLACE, (4,), (1,)) + b"}" + text("offset") + number(999) + b"sb",
    "state on a storage": PLACE + b"}" + text("size") + number(999) + b"sb",
    "item of a tensor": tensor(PLACE, (4,), (1,)) + text("a") + b"Ns",
    "call of a string": text("os.system") + b")R",
    "call without a tuple": FUNCTION + b"]R",
    "unhashable key": b"}]Ns",
    "number as key": b"}K\x01Ns",
    "key without value": b"}(Nu",
    "key twice": b"}(" + text("a") + b"N" + text("a") + b"Nu",
    "numbers as a name": b"K\x01K\x02\x93",
    "empty stack": b"\x87\x87",
    "no mark": b"tttttt",
    "unknown memo": b"h\x07",
    "open mark": b"((",
    "bad utf-8": b"X\x01\x00\x00\x00\xff",
    "text beyond the end": b"X\xff\xff\xff\x7fabc",
    "unknown instruction": b"\xfe",
    "bool as a size": tensor(PLACE, (), (), tail=b"\x89}").replace(b"(t(t", b"\x88\x85K\x01\x85"),
    "float as an offset": FUNCTION
    + tuple_of(PLACE, b"G" + bytes(8), numbers([4]), numbers([1]), b"\x89}")
    + b"R",
    "sizes as a list": FUNCTION + tuple_of(PLACE, number(0), b"]", b"]", b"\x89}") + b"R",
    "negative offset": tensor(PLACE, (2,), (1,), -1),
    "negative stride": tensor(PLACE, (2,), (-1,), 3),
    "negative size": tensor(PLACE, (-1,), (1,)),
    "negative storage": tensor(storage("0", "FloatStorage", -4), (0,), (1,)),
    "tensor of nothing": tensor(b"N", (4,), (1,)),
    "parameter of nothing": parameter(b"N"),
    "storage key as a number": tensor(
        tuple_of(text("storage"), name_of("torch.FloatStorage"), number(0), text("cpu"), b"K\x04")
        + b"Q",
        (4,),
        (1,),
    ),
}


@pytest.mark.parametrize("title", MALFORMED)
def test_a_pickle_without_sense_is_damaged(tmp_path: Path, title: str) -> None:
    refused(
        write(tmp_path / "m.bin", pickled({"w": MALFORMED[title]})),
        "data.pkl is damaged",
        "download it again",
    )


@pytest.mark.parametrize("program", [b"", b".", b"\x80\x02", b"\x80\x02}", b"\x80\x02NN."])
def test_a_pickle_without_a_result_is_damaged(tmp_path: Path, program: bytes) -> None:
    refused(write(tmp_path / "m.bin", program), "data.pkl is damaged", "download it again")


def test_depth_does_no_harm(tmp_path: Path) -> None:
    # pickle.loads would hash this as a key and overflow the C stack, which kills the process.
    deep = b")" + b"\x85" * 200_000
    refused(
        write(tmp_path / "key.bin", b"\x80\x02}" + deep + b"Ns."),
        "data.pkl is damaged (a tuple in place of a str)",
    )
    refused(
        write(tmp_path / "value.bin", pickled({"w": deep})),
        "entry 'w' is of type tuple, not a tensor",
    )
    refused(
        write(tmp_path / "self.bin", b"\x80\x02}q\x00" + text("w") + b"h\x00s."),
        "entry 'w' is of type dict",
    )


OTHER_VALUES = {
    "int": number(3),
    "float": b"G" + bytes(8),
    "str": text("x"),
    "list": b"](NNe",
    "nonetype": b"N",
    "bool": b"\x88",
    "dict": b"}" + text("w") + ONE["w"] + b"s",
    "storage": PLACE,
}


@pytest.mark.parametrize("kind", OTHER_VALUES)
def test_an_entry_that_is_no_tensor_is_named(tmp_path: Path, kind: str) -> None:
    program = pickled({**ONE, "state_dict": OTHER_VALUES[kind]})
    refused(
        write(tmp_path / "m.bin", program), f"entry 'state_dict' is of type {kind}, not a tensor"
    )
    program = b"\x80\x02" + OTHER_VALUES[kind] + b"."
    if kind != "dict":
        refused(
            write(tmp_path / "bare.bin", program),
            f"holds an object of type {kind}, not a dict of tensors",
        )


@pytest.mark.parametrize("name", ["", "a\nb", "\ud800", "x" * 2000])
def test_names_that_cannot_be_shown_are_refused(tmp_path: Path, name: str) -> None:
    assert (
        len(refused(write(tmp_path / "m.bin", pickled({name: ONE["w"]})), "the tensor name")) < 400
    )


def test_limits_on_the_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.bin", pickled(ONE))
    monkeypatch.setattr(torch_pickle, "_MAX_INSTRUCTIONS", 10)
    refused(path, "has more than 10 instructions")
    monkeypatch.setattr(torch_files, "_MAX_PICKLE", 20)
    refused(path, "data.pkl' has", "more than the 20 that are read")
    monkeypatch.setattr(torch_files, "_MAX_DIRECTORY", 100)
    refused(path, "its zip directory cannot be read")


# Tensors outside their storage

OUTSIDE: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "one too many": ((5,), (1,), 0),
    "offset": ((2,), (1,), 3),
    "offset of an item": ((), (), 4),
    "stride": ((2, 2), (3, 1), 0),
    "stride-0 bomb": ((1 << 30,), (0,), 0),
    "stride-0 bomb in many dims": ((100, 100, 100), (0, 0, 0), 0),
    "huge numbers": (((1 << 31) - 1,), (1,), 0),
    "huge offset": ((1,), (1,), 1 << 80),
    "huge stride": ((2,), (1 << 80,), 0),
}


@pytest.mark.parametrize("title", OUTSIDE)
def test_a_tensor_beyond_its_storage_is_named(tmp_path: Path, title: str) -> None:
    shape, strides, offset = OUTSIDE[title]
    program = pickled({"a.weight": tensor(PLACE, shape, strides, offset)})
    refused(write(tmp_path / "m.bin", program), "tensor 'a.weight' reaches beyond its storage")


@pytest.mark.parametrize(
    ("shape", "strides", "words"),
    [
        ((1,) * 9, (1,) * 9, "more than 8 dimensions"),
        ((2, 2), (1,), "2 sizes and 1 strides"),
        ((0, 1 << 31), (1, 1), "too long for MLX"),
        ((0, 1 << 30, 1 << 30), (1, 1, 1), "too long for MLX"),
        ((1 << 80,), (1,), "too long for MLX"),
    ],
)
def test_shapes_that_mlx_cannot_hold(tmp_path: Path, shape: Any, strides: Any, words: str) -> None:
    refused(
        write(tmp_path / "m.bin", pickled({"w": tensor(PLACE, shape, strides)})),
        "tensor 'w' has ",
        words,
    )


def test_a_short_or_absent_storage_is_named(tmp_path: Path) -> None:
    refused(
        write(tmp_path / "short.bin", pickled(ONE), {"0": DATA[:-1]}), "4 float32 items", "15 bytes"
    )
    refused(
        write(tmp_path / "none.bin", pickled(ONE), {"1": DATA}), "storage '0', which the file lacks"
    )
    bomb = pickled({"w": tensor(storage("0", "FloatStorage", 1 << 62), (1 << 30,), (1,))})
    refused(write(tmp_path / "bomb.bin", bomb), "tensor 'w' lies in a storage of")
    path_key = pickled(
        {"w": tensor(storage("../../../../etc/passwd", "FloatStorage", 4), (4,), (1,))}
    )
    refused(write(tmp_path / "path.bin", path_key), "which the file lacks")


def test_a_file_that_changes_after_its_header_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", pickled({**ONE, "column": tensor(PLACE, (2,), (2,))}))
    tensors = read_torch_file(path)
    path.write_bytes(path.read_bytes()[: tensors["w"].file_offset + 10])
    for stored in tensors.values():
        with pytest.raises(
            CheckpointError, match=r"m\.bin: ends \d bytes too early: download it again"
        ):
            stored.read()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"m\.bin: has gone"):
        tensors["w"].read()


# Files that are no such zip


def test_files_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "absent.bin", "is missing", "download the whole model folder")
    refused(tmp_path, "is no file", "name the .bin file itself")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "x.bin", "cannot be read")
    os.mkfifo(tmp_path / "pipe.bin")
    refused(tmp_path / "pipe.bin", "is no file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("is empty", "download it again")),
        (
            pickle.dumps({"w": 1}, 2),
            ("is a bare pickle", "re-save it with a current PyTorch", "safetensors"),
        ),
        (b"\x80", ("is a bare pickle",)),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            ("Git LFS pointer", "git lfs pull"),
        ),
        (b"<!doctype html>", ("is no PyTorch zip file", "download it again")),
        (b"P", ("is no PyTorch zip file", "download it again")),
        (b"PK\x03\x04", ("is cut off or damaged", "download it again")),
        (b"PK\x03\x04" + bytes(1000), ("is cut off or damaged", "download it again")),
    ],
)
def test_content_that_is_no_zip(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(content)
    refused(path, *words)


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    for names in ([], ["readme.txt"], ["data.pkl"], ["a/b/data.pkl"], ["a/data.pkl", "b/data.pkl"]):
        path = tmp_path / "m.bin"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, pickled(ONE))
        refused(path, "no PyTorch" if names else "is no PyTorch zip file")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "m.bin", pickled(ONE)).read_bytes()
    path = tmp_path / "cut.bin"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path, "download it again")


def test_compressed_encrypted_and_big_endian(tmp_path: Path) -> None:
    refused(
        write(tmp_path / "z.bin", pickled(ONE), compression=zipfile.ZIP_DEFLATED),
        "is compressed",
        "re-save",
    )
    path = write(tmp_path / "e.bin", pickled(ONE))
    patch_directory(path, "archive/data/0", flags=1)
    refused(path, "'archive/data/0' is encrypted", "re-save")
    refused(
        write(tmp_path / "b.bin", pickled(ONE), byteorder=b"big"), "byte order is b'big'", "re-save"
    )
    refused(
        write(tmp_path / "l.bin", pickled(ONE), byteorder=b"x" * 999), "byteorder' has 999 bytes"
    )


def test_an_entry_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", pickled(ONE))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", DATA)
    refused(path, "holds the entry 'archive/data/0' twice")


@pytest.mark.parametrize(
    "lie",
    [
        {"packed": 1 << 20, "size": 1 << 20},
        {"packed": 17, "size": 17},
        {"packed": 8, "size": 8},
        {"size": 1 << 20},
        {"local": 0},
        {"local": 1},
        {"local": 1 << 30},
        {"flags": 0x800, "local": 0},
    ],
)
def test_an_entry_that_lies_about_itself(tmp_path: Path, lie: dict[str, int]) -> None:
    path = write(tmp_path / "m.bin", pickled(ONE))
    patch_directory(path, "archive/data/0", **lie)
    refused(path, "is cut off or damaged", "download it again")


def test_entries_that_overlap(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.bin", pickled(ONE), {"1": DATA}).read_bytes()
    start = plain.index(b"archive/data/1") - 30
    inner = plain[start : start + 30 + 14 + len(DATA)]  # a whole entry "1", inside the data of "0"
    path = write(tmp_path / "m.bin", pickled(ONE), {"0": inner, "1": DATA})
    assert list(read_torch_file(path)) == ["w"]
    patch_directory(path, "archive/data/1", local=path.read_bytes().index(inner))
    refused(path, "zip entries overlap")


# Any bytes at all


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = storage("0", "FloatStorage", 4)
    entries = {
        "a": tensor(place, (2, 2), (1, 2)),
        "b": parameter(tensor(place, (3,), (1,), 1)),
        **ONE,
    }
    return write(tmp_path_factory.mktemp("fuzz") / "m.bin", pickled(entries))


def check_ending(path: Path) -> None:
    """Either one line that names the file, or tensors that can be read."""
    message = None
    try:
        tensors = read_torch_file(path)
    except CheckpointError as error:
        message = str(error)
    if message is None:
        assert all(stored.read().shape == stored.shape for stored in tensors.values())
    else:
        assert message.startswith(f"{path}: ")
        assert message.isprintable()


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_damaged_bytes_raise_one_kind_of_error_or_give_tensors(
    small_file: Path, data: st.DataObject
) -> None:
    content = bytearray(small_file.read_bytes())
    for place in data.draw(
        st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4), "places"
    ):
        content[place] = data.draw(st.integers(0, 255), "byte")
    path = small_file.with_name("damaged.bin")
    path.write_bytes(
        content[: data.draw(st.one_of(st.none(), st.integers(0, len(content))), "length")]
    )
    check_ending(path)


@settings(deadline=None, max_examples=400)
@given(
    program=st.lists(
        st.sampled_from(
            [
                b"(",
                b"t",
                b"\x85",
                b"}",
                b"]",
                b"s",
                b"u",
                b"a",
                b"e",
                b"b",
                b"R",
                b"Q",
                b"N",
                b"K\x01",
                b"q\x01",
                b"h\x01",
                b"\x93",
                b"\x94",
                text("a"),
                PLACE,
                ONE["w"],
                ORDERED_DICT,
                FUNCTION,
                b".",
                b"0",
                b"2",
                b"1",
            ]
        ),
        max_size=30,
    )
)
def test_any_order_of_instructions_ends_well(small_file: Path, program: list[bytes]) -> None:
    path = write(small_file.with_name("program.bin"), b"\x80\x02}" + b"".join(program) + b".")
    check_ending(path)


def test_a_long_tuple_that_is_named_often_takes_no_memory(tmp_path: Path) -> None:
    """Copies of this one would take 80 GB."""
    long = b"(" + b"K\x01" * 100_000 + b"tq\x02"
    place = PLACE + b"q\x01"
    tensors = {}
    for i in range(5000):
        first = i == 0
        sides = long if first else b"h\x02"
        arguments = tuple_of(place if first else b"h\x01", number(0), sides, b"h\x02", b"\x89}")
        tensors[f"t{i}"] = name_of("torch._utils._rebuild_tensor_v2") + arguments + b"R"
    start = time.process_time()
    refused(write(tmp_path / "m.bin", pickled(tensors)), "tensor 't0' has more than 8 dimensions")
    assert time.process_time() - start < 5


def test_many_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    """A small file would become gigabytes; two views, as of tied weights, are taken."""
    views = {f"w{i}": tensor(PLACE, (4,), (1,)) for i in range(400)}
    problem = "describes 6,400 bytes of tensors, but stores"
    refused(write(tmp_path / "many.bin", pickled(views)), problem)
    tied = {name: views[name] for name in ("w0", "w1")}
    assert len(read_torch_file(write(tmp_path / "tied.bin", pickled(tied)))) == 2


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_changed_byte_is_found_by_the_checksum(tmp_path: Path, block: int) -> None:
    path = write(tmp_path / "m.bin", pickled(ONE))
    content = bytearray(path.read_bytes())

    def read_all() -> None:
        checksums = ChecksumReader(path)
        for start in range(0, len(content), block):
            checksums.update(content[start : start + block])

    read_all()
    content[content.index(DATA) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checksum of .*data/0' is wrong"):
        read_all()


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    """``torch.serialization.set_crc32_options(False)`` stores 0 for each."""
    path = write(tmp_path / "m.bin", pickled(ONE))
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            content = content.replace(struct.pack("<I", info.CRC), bytes(4))
    path.write_bytes(content)
    ChecksumReader(path).update(content)
