"""The seed corpus: small legal inputs of every reader, from the fixtures or made here."""

from __future__ import annotations

import base64
import io
import json
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image

from mlx_janus.config import CONVERTED_MODEL_TYPE, FORMAT_VERSION, JanusConfig
from mlx_janus.processing.saved_images import encode_image
from mlx_janus.weights.folder import make_stamp
from mlx_janus.weights.names import TINY
from mlx_janus.weights.safetensors_files import write_safetensors
from tests.support.configs import published_1b
from tests.support.golden import FIXTURES, FOLDERS
from tests.support.torch_checkpoints import (
    ONE,
    ORDERED_DICT,
    number,
    parameter,
    pickled,
    storage,
    tensor,
    text,
    write,
)

PICTURE = Image.radial_gradient("L").resize((24, 16)).convert("RGB")
CHAT_PICTURES = ("chat-red.png", "chat-blue.png")
"""Names of the images beside a saved conversation."""


def as_json(value: Any) -> bytes:
    """Return a value as JSON."""
    return json.dumps(value, ensure_ascii=False).encode()


def configs() -> list[bytes]:
    """Return configs of converted folders, of both format versions and quantized."""
    old = (TINY / "config.json").read_bytes()
    header = {"model_type": CONVERTED_MODEL_TYPE, "format_version": FORMAT_VERSION}
    new = header | JanusConfig.load(TINY / "config.json").to_dict()
    layer = {"path": "language_model.layers.0.mlp.up_proj", "bits": 4, "group_size": 32}
    quantization = {"layers": [layer], "bits": 4, "group_size": 32, "kept_float": ["a"]}
    return [old, as_json(new), as_json(new | {"quantization": quantization})]


def published_files() -> list[bytes]:
    """Return every JSON file of the fixtures, after a line that names it."""
    found = []
    for folder in FOLDERS:
        for path in sorted((FIXTURES / folder).glob("*.j*")):
            if not path.name.endswith("index.json"):
                found.append(f"{folder}/{path.name}\n".encode() + path.read_bytes())
    one_billion = as_json(published_1b({"hidden_size": 2048}))
    return [*found, b"deepseek-pro-bin/config.json\n" + one_billion]


def indexes() -> list[bytes]:
    """Return indexes of shards."""
    weight_map = {f"layers.{i}.weight": f"model-0000{i % 2}-of-00002.safetensors" for i in range(4)}
    return [
        as_json({"metadata": {"total_size": 16}, "weight_map": weight_map}),
        as_json({"weight_map": {"w": "model.safetensors"}}),
    ]


def safetensors() -> list[bytes]:
    """Return weight files: stamped ones and one without metadata."""
    stamp = make_stamp("some/model", "", None, {"config.json": "0" * 64})
    arrays = {
        "a.weight": mx.arange(12, dtype=mx.float32).reshape(3, 4),
        "b": mx.zeros((2, 2, 2), mx.bfloat16),
        "c": mx.array([1, 2], mx.uint32),
        "empty": mx.zeros((0, 3)),
    }
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        for metadata in (stamp, stamp | {"roles": "pro"}, {}):
            write_safetensors(path, arrays, metadata)
            found.append(path.read_bytes())
    return found


def pickles() -> list[bytes]:
    """Return pickles of checkpoints, with each form of instruction that the reader knows."""
    place = storage("0", "FloatStorage", 4)
    shared = {
        "a": tensor(place, (2,), (1,)) + b"q\x01",
        "b": parameter(tensor(place, (2, 1), (1, 1), 2)),
        "tied": b"h\x01",
    }
    metadata = b"}" + text("_metadata") + ORDERED_DICT + text("") + b"}" + text("v") + number(1)
    with_state = (
        b"\x80\x02" + ORDERED_DICT + b"(" + text("w") + ONE["w"] + b"u" + metadata + b"sssb."
    )
    names = b"\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93\x94"
    protocol_4 = (
        b"\x80\x04\x95\x20\0\0\0\0\0\0\0}\x94" + names + b"]\x85\x86\x87." + pickled(ONE)[2:]
    )
    return [pickled(ONE), pickled(shared), with_state, protocol_4]


def torch_zips() -> list[bytes]:
    """Return checkpoints of one storage around each of the pickles."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.bin")
        for program in pickles():
            found.append(write(path, program).read_bytes())
        found.append(write(path, pickled(ONE), byteorder=None).read_bytes())
    return found


def tokenizers() -> list[bytes]:
    """Return tokenizers: Janus-Tiny's and the fixtures'."""
    folders = [TINY, *(FIXTURES / name for name in FOLDERS)]
    return [(folder / "tokenizer.json").read_bytes() for folder in folders]


def conversations() -> list[bytes]:
    """Return saved conversations, with images, marks, tokens and drawings."""
    red, blue = CHAT_PICTURES
    head = {"format": "mlx_janus conversation", "version": 1, "model": "tiny", "system": None}
    answer = {"role": "assistant", "text": "A red circle.", "tokens": [12, 40, 7]}
    messages = [
        {"role": "drawing", "text": "a red circle", "pictures": [red]},
        {"role": "user", "text": "What is {image} and {image}?", "pictures": [red, blue]},
        answer,
        {"role": "user", "text": "Why?"},
        {"role": "assistant", "text": "So."},
    ]
    marked = [messages[0], messages[1] | {"marked": True}, answer]
    return [
        as_json(head | {"messages": messages}),
        as_json(head | {"system": "Be brief.", "messages": marked}),
        as_json(head | {"messages": []}),
    ]


def pngs() -> list[bytes]:
    """Return PNGs of each colour type, with settings, transparency, EXIF and a palette."""
    settings = {
        "version": "mlx_janus 0.1.0",
        "prompt": "a red circle",
        "seed": "5",
        "cfg_weight": "5.0",
        "temperature": "1.0",
        "top_p": "1.0",
        "model": "tiny",
        "upscale": "2 (Lanczos)",
        "dtype": "float32",
        "bits": "4",
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = PICTURE.quantize(8)
    deep = Image.new("I;16", (4, 4), 700)
    return [
        encode_image(PICTURE, settings),
        _encoded(PICTURE, "PNG", transparency=(1, 2, 3), exif=exif, dpi=(72, 72)),
        _encoded(palette, "PNG", transparency=3),
        _encoded(PICTURE.convert("RGBA"), "PNG"),
        _encoded(PICTURE.convert("1"), "PNG", bits=1),
        _encoded(deep, "PNG"),
        _encoded(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(90)]),
        _interlaced(),
    ]


def _interlaced() -> bytes:
    """Return an interlaced PNG of one pixel, which PIL cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 1)
    pixels = zlib.compress(b"\0\1\2\3")
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def images() -> list[bytes]:
    """Return images of each other format that is read."""
    exif = Image.Exif()
    exif[0x0112] = 6
    comment = {"version": "mlx_janus 0.1.0", "prompt": "x"}
    found = [
        encode_image(PICTURE, comment, ".jpg"),
        encode_image(PICTURE, comment, ".webp"),
        _encoded(PICTURE, "JPEG", progressive=True, exif=exif),
        _encoded(PICTURE.convert("CMYK"), "JPEG"),
        _encoded(PICTURE.convert("L"), "JPEG")[:-2],
        _encoded(PICTURE, "WEBP", lossless=True),
        _encoded(PICTURE.quantize(8), "GIF", transparency=2),
        _encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)]),
        _encoded(PICTURE, "BMP"),
        _encoded(PICTURE, "PPM"),
        _encoded(PICTURE, "ICO", sizes=[(16, 16)]),
    ]
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"):
        image = PICTURE.convert("1") if compression == "group4" else PICTURE
        found.append(_encoded(image, "TIFF", compression=compression))
    if "AVIF" in Image.SAVE:
        found.append(_encoded(PICTURE, "AVIF"))
    return found


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the bytes of an image file."""
    Image.init()
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def json_lines() -> list[bytes]:
    """Return files of captions, one of them cut in its last line."""
    lines = [as_json({"path": f"{i}.png", "prompt": "What?", "text": "é" * i}) for i in range(3)]
    odd = b'{"path": "\\udcff.png", "prompt": "What?", "text": ""}'
    whole = b"\n".join([*lines, odd, b""])
    return [whole, whole + lines[0][:20], b"", whole + b"{"]


def requests() -> list[bytes]:
    """Return bodies of both routes, after a line of the route and the type of the content."""
    encoded = base64.b64encode(_encoded(PICTURE, "PNG")).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": "Why?"},
    ]
    options = {
        "model": "fake",
        "max_tokens": 20,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "n": 2,
        "stop": ["\n"],
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": -1.5},
        "presence_penalty": 0.1,
        "stream_options": {"include_usage": True},
    }
    drawing = {"prompt": "a red circle", "n": 2, "size": "auto", "seed": 3}
    further = {"response_format": "b64_json", "output_format": "jpeg", "output_compression": 50}
    streamed = drawing | {"stream": True, "partial_images": 2}
    chat, draw = b"/v1/chat/completions json\n", b"/v1/images/generations json\n"
    return [
        chat + as_json({"messages": talk, **options, "stream": True}),
        chat + as_json({"messages": talk[-1:]}),
        chat + as_json({"messages": talk, "max_completion_tokens": 5, "stop": "x"}),
        draw + as_json(drawing | further),
        draw + as_json(streamed),
    ]


Seeds = Callable[[], list[bytes]]
