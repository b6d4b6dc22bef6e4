"""Changes of an input that keep most of its format, so that they reach the inner checks.

A mutator takes an input, a random generator and other inputs of the same kind, and returns a
changed input. Equal arguments give equal results.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutate = Callable[[bytes, Random, Sequence[bytes]], bytes]

_MAX_INPUT = 1 << 20  # bytes; a repeated part must not grow from input to input
_SIZES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63)
_TEXTS = (
    "",
    "\0",
    "a" * 2000,
    "\u202e",
    "𝄞",
    "é" * 40,
    "<|User|>",
    "../x",
    "1e999",
    "\n\x1b[31m",
    "F64",
    "F4",
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [{}], [None], {"": None}),
    *(0, 1, -1, 2, 255, 2**31, 2**53, 2**63 - 1, -(2**63), 0.5, -0.0, 1e-320, 1e308),
    *_TEXTS,
)
# Values that ``json.dumps`` does not write. A text of this name stands for each until then.
_RAW = {
    "@deep list@": "[" * 300 + "]" * 300,
    "@very deep list@": "[" * 50_000 + "]" * 50_000,
    "@deep object@": '{"a":' * 300 + "1" + "}" * 300,
    "@nested@": "[" * 60 + "]" * 60,
    "@many digits@": "1" * 5000,
    "@large@": str(2**64),
    "@NaN@": "NaN",
    "@Infinity@": "-Infinity",
    "@exponent@": "1e999",
    "@surrogate@": '"\\ud800"',
    "@twins@": '{"a": 1, "a": 2}',
    "@wide list@": f"[{'0,' * 20_000}0]",
    "@objects@": f"[{'{},' * 5000}" + "{}]",
}


def mutate_bytes(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change, cut, repeat or join the bytes of an input, without regard to its format."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        _change_bytes(content, random, others)
    return bytes(content[:_MAX_INPUT])


def _change_bytes(content: bytearray, random: Random, others: Sequence[bytes]) -> None:
    """Make one change in place."""
    start = random.randint(0, len(content))
    end = min(len(content), start + random.choice((1, 2, 4, 8, 64, 1024)))
    match random.randrange(8):
        case 0 if start < len(content):
            content[start] ^= 1 << random.randrange(8)
        case 1:
            content[start:end] = random.randbytes(end - start)
        case 2:
            del content[start:end]
        case 3:
            del content[start:]
        case 4:
            content[start:start] = content[start:end] * random.choice((1, 2, 300))
        case 5:
            other = random.choice(others) if others else b""
            content[start:] = other[random.randint(0, len(other)) :]
        case _:  # a length or an offset
            width = random.choice((1, 2, 4, 8))
            number = random.choice(_SIZES) + random.choice((-1, 0, 0, 1))
            order = random.choice(("little", "big"))
            raw = (number % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
            content[start : start + width] = raw


# JSON


def mutate_json(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Replace, remove, copy or repeat a value of a JSON text at any depth."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random, others)
    if random.random() < 0.05:
        return mutate_bytes(data, random, others)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _change_value(value, random, others)
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode("utf-8", "surrogatepass")[:_MAX_INPUT]


def _change_value(value: Any, random: Random, others: Sequence[bytes]) -> Any:
    """Change a value that is reached by random steps from the root, and return the root."""
    parent: Any = None
    key: Any = None
    node = value
    # A random descent reaches the few entries at the top as often as the many at the bottom.
    while isinstance(node, dict | list) and node and random.random() < 0.85:
        parent, key = (
            node,
            random.choice(list(node) if isinstance(node, dict) else range(len(node))),
        )
        node = parent[key]
    if parent is None:
        return _other_value(node, random, others)
    kind = random.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        many = 50 if isinstance(node, dict | list) else 2000
        parent[key:key] = [node] * random.choice((1, 2, many))
    elif kind == 1:
        parent[random.choice((*parent, *_TEXTS, f"{key}x"))] = node
    elif kind == 2:
        other = random.choice(_keys(parent))
        parent[key], parent[other] = parent[other], node
    else:
        parent[key] = _other_value(node, random, others)
    return value


def _keys(value: Any) -> Sequence[Any]:
    """Return the keys of an object, or the indexes of a list."""
    return list(value) if isinstance(value, dict) else range(len(value))


def _other_value(value: Any, random: Random, others: Sequence[bytes]) -> Any:
    """Return a value in place of another: near to it, of another type, or of another input."""
    kind = random.randrange(10)
    if kind == 0 and others:
        try:
            return json.loads(random.choice(others))
        except (ValueError, RecursionError):
            return None
    if kind < 3:
        return random.choice(tuple(_RAW))
    if kind < 7 and isinstance(value, int | float) and abs(value) < 2**70:
        return random.choice((value + 1, value - 1, -value, value * 2, value / 3, value * 10**9))
    if kind < 7 and isinstance(value, str):
        return _other_text(value, random)
    if kind == 7:
        return [value]
    if kind == 8:
        return {random.choice(("type", "content", "a")): value}
    return copy.deepcopy(random.choice(_VALUES))  # a later change is made in place


def _other_text(text: str, random: Random) -> str:
    """Return a text with a part removed, repeated or replaced."""
    place = random.randint(0, len(text))
    return random.choice(
        (
            text[:place],
            text[:place] + random.choice(_TEXTS) + text[place:],
            text[:place] + chr(random.choice((random.randrange(128), random.randrange(0xD7FF)))),
            text[:1000] * random.choice((2, 100)),
            text[::-1],
            text.swapcase(),
        )
    )[:100_000]


def mutate_json_lines(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change a line of a file of JSON lines, or the order and the ends of its lines."""
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    match random.randrange(6):
        case 0:
            del lines[place]
        case 1:
            lines[place:place] = [lines[place]] * random.choice((1, 2, 100))
        case 2:
            lines.append(lines[place][: random.randint(0, len(lines[place]))])
        case 3:
            return mutate_bytes(data, random, others)
        case _:
            lines[place] = mutate_json(lines[place], random, lines)
    return random.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)[:_MAX_INPUT]


def after_first_line(mutate: Mutate) -> Mutate:
    """Return a mutator that keeps the first line of an input, which names a file or a route."""

    def mutate_rest(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
        head, _, rest = data.partition(b"\n")
        rests = [other.partition(b"\n")[2] for other in others]
        return head + b"\n" + mutate(rest, random, rests)

    return mutate_rest


def mutate_request(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change the first line of a request, or its body; sometimes compress the body."""
    head, _, body = data.partition(b"\n")
    if random.random() < 0.1:
        head = head.replace(random.choice((b"json", b" ", b"/", b"application")), b"gzip", 1)
    if random.random() < 0.05:
        body = gzip.compress(body, mtime=0)
        head += b" gzip"
        return head + b"\n" + mutate_bytes(body, random, others)
    rests = [other.partition(b"\n")[2] for other in others]
    return head + b"\n" + mutate_json(body, random, rests)


# Weights


def mutate_safetensors(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change the header of a safetensors file as JSON, and mostly keep its length right."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.2 or length > len(data):
        return mutate_bytes(data, random, others)
    header = mutate_json(data[8 : 8 + length], random, [])
    right = random.random() < 0.9
    given = len(header) if right else random.choice((length, 0, 1 << 24, 1 << 62, (1 << 64) - 1))
    return struct.pack("<Q", given) + header + data[8 + length :]


def mutate_pickle(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Drop, repeat, swap or borrow instructions of a pickle, or change their arguments."""
    instructions = _instructions(data)
    if not instructions or random.random() < 0.1:
        return mutate_bytes(data, random, others)
    for _ in range(random.choice((1, 1, 2, 4))):
        place = random.randrange(len(instructions))
        other = random.randrange(len(instructions))
        match random.randrange(7):
            case 0 if len(instructions) > 1:
                del instructions[place]
            case 1:
                instructions[place:place] = [instructions[place]] * random.choice((1, 2, 300))
            case 2:
                swapped = instructions[other], instructions[place]
                instructions[place], instructions[other] = swapped
            case 3:
                part = instructions[place : place + random.choice((2, 8, 40))]
                instructions[other:other] = part * random.choice((1, 1, 50))
            case 4:  # any opcode, with bytes after it that an argument may need
                code = random.choice(pickletools.opcodes).code.encode("latin-1")
                instructions.insert(place, code + random.randbytes(random.choice((0, 0, 1, 4, 9))))
            case 5:
                borrowed = _instructions(random.choice(others)) if others else []
                instructions[place:place] = borrowed[: random.choice((1, 5, 50))]
            case _:
                instruction = instructions[place]
                instructions[place] = instruction[:1] + mutate_bytes(instruction[1:], random, ())
    return b"".join(instructions)[:_MAX_INPUT]


def _instructions(data: bytes) -> list[bytes]:
    """Return the instructions of a pickle, each with its argument; [] if it has another form."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            places = [place for _, _, place in pickletools.genops(data)]
    except Exception:
        return []
    ends = [*places[1:], len(data)]
    return [data[start:end] for start, end in zip(places, ends, strict=True)]


def mutate_torch_zip(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change the pickle in a checkpoint, its entries, or the fields of its zip headers."""
    if random.random() < 0.4:
        return _mutate_zip_fields(data, random)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return mutate_bytes(data, random, others)
    if not entries or random.random() < 0.15:
        return mutate_bytes(data, random, others)
    place = random.randrange(len(entries))
    name, content = entries[place]
    kind = random.randrange(8)
    if kind == 0:
        del entries[place]
    elif kind == 1:
        entries[place] = (_other_text(name, random), content)
    elif kind == 2:
        entries.append((random.choice(entries)[0], content))
    elif kind == 3:
        entries[place] = (name, mutate_bytes(content, random, ()))
    else:
        mutated = [n for n, _ in entries].index(name)
        for index, (entry_name, pickled) in enumerate(entries):
            if entry_name.endswith("data.pkl"):
                mutated = index
                content = mutate_pickle(pickled, random, ())
        entries[mutated] = (entries[mutated][0], content)
    return _zip(entries)


def _zip(entries: Sequence[tuple[str, bytes]]) -> bytes:
    """Return a zip of uncompressed entries, as ``torch.save`` writes it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a name that is there twice
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries:
                info = zipfile.ZipInfo(name.encode(errors="replace").decode() or "x")
                archive.writestr(info, content)
    return file.getvalue()


def _mutate_zip_fields(data: bytes, random: Random) -> bytes:
    """Overwrite a field of a zip's local header, directory entry or end record."""
    content = bytearray(data)
    signature = random.choice((b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7"))
    places = [i for i in range(len(data) - 4) if data[i : i + 4] == signature]
    if not places:
        return mutate_bytes(data, random, ())
    place = random.choice(places) + random.randrange(4, 46, 2)
    width = random.choice((2, 4))
    number = random.choice((*_SIZES, len(data), len(data) - 1, random.randrange(1 << 16)))
    content[place : place + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(content)


# Images


def mutate_image(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Change a PNG by its chunks, and any other image by its bytes, mostly in its headers."""
    if data.startswith(b"\x89PNG"):
        return mutate_png(data, random, others)
    if random.random() < 0.5 and len(data) > 64:
        return mutate_bytes(data[:64], random, ()) + data[64:]
    return mutate_bytes(data, random, others)


def mutate_png(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Drop, repeat, swap or change chunks of a PNG, and mostly correct their checksums."""
    chunks = _png_chunks(data)
    if not chunks or random.random() < 0.1:
        return mutate_bytes(data, random, others)
    place = random.randrange(len(chunks))
    kind, content = chunks[place]
    match random.randrange(7):
        case 0:
            del chunks[place]
        case 1:
            chunks[place:place] = [chunks[place]] * random.choice((1, 2, 300))
        case 2:
            other = random.randrange(len(chunks))
            chunks[place], chunks[other] = chunks[other], chunks[place]
        case 3:
            borrowed = _png_chunks(random.choice(others)) if others else chunks
            chunks.insert(place, random.choice(borrowed or chunks))
        case 4:
            text = mutate_bytes(b"prompt\0" + random.choice(_TEXTS).encode(), random, ())
            packed = b"\0" + zlib.compress(text * random.choice((1, 1, 9000)))
            new = random.choice(((b"tEXt", text), (b"zTXt", b"a\0" + packed), (b"iTXt", text)))
            chunks.insert(place, new)
        case _:
            chunks[place] = (kind, mutate_bytes(content, random, ()))
    wrong = random.randrange(len(chunks) + 1) if random.random() < 0.1 else -1
    result = data[:8]
    for index, (kind, content) in enumerate(chunks):
        checksum = zlib.crc32(kind + content) ^ (index == wrong)
        result += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return result[:_MAX_INPUT]


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return kind and content of each whole chunk of a PNG."""
    chunks = []
    place = 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks
