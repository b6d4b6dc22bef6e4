"""Files that every viewer shows are read, whatever their metadata and their last bytes are."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from mlx_janus.errors import ImageError
from mlx_janus.installation import install_command
from mlx_janus.processing import image_data
from mlx_janus.processing.images import open_image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(number: int, data: bytes) -> bytes:
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(data) + 2) + data


def wrong_checksum(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


PICTURE = Image.radial_gradient("L").convert("RGB").resize((90, 70))
PNG = encoded(PICTURE, "PNG")
JPEG = encoded(PICTURE, "JPEG")
TURNED = Image.Exif()
TURNED[0x0112] = 6
TURNED = TURNED.tobytes().removeprefix(b"Exif\0\0")
WORKFLOW = zlib.compress(b'{"node": 1}' * 300_000)  # 3.3 MB of text, as ComfyUI writes it
PROFILE = zlib.compress(os.urandom(3_000_000))

CHUNKS = {
    "large compressed text": chunk(b"zTXt", b"workflow\0\0" + WORKFLOW),
    "large international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + WORKFLOW),
    "large plain text": chunk(b"tEXt", b"workflow\0" + b"x" * 70_000_000),
    "much text": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000))) * 100,
    "large profile": chunk(b"iCCP", b"p\0\0" + PROFILE),
    "unknown compression of a profile": chunk(b"iCCP", b"p\0\1x"),
    "wrong checksum of a text": wrong_checksum(chunk(b"tEXt", b"a\0b")),
    "wrong checksum of a profile": wrong_checksum(chunk(b"iCCP", b"p\0\0" + zlib.compress(b"x"))),
    "wrong checksum of EXIF": wrong_checksum(chunk(b"eXIf", TURNED)),
    "wrong checksum of transparency": wrong_checksum(chunk(b"tRNS", bytes(6))),
    "short transparency": chunk(b"tRNS", b"x"),
    "short pHYs": chunk(b"pHYs", b"x"),
    "short gAMA": chunk(b"gAMA", b"x"),
    "short cHRM": chunk(b"cHRM", b"x"),
    "short sRGB": chunk(b"sRGB", b""),
    "short animation": chunk(b"acTL", b"") + chunk(b"fcTL", b""),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_metadata_of_a_png_is_no_reason_to_refuse_it(name):
    before = PNG[:33] + CHUNKS[name] + PNG[33:]
    after = PNG[:-12] + CHUNKS[name] + PNG[-12:]
    for data in (before, after):
        assert open_image(data).tobytes() == PICTURE.tobytes()


SEGMENTS = {
    "short JFIF": segment(0, b"JFIF"),
    "short Adobe": segment(14, b"Adobe"),
    "short profile": segment(2, b"ICC_PROFILE\0"),
    "broken MPF": segment(2, b"MPF\0MM\0*\0\0\0\x08\0\0"),
    "broken Photoshop": segment(13, b"Photoshop 3.0\0008BIM\4"),
    "broken EXIF": segment(1, b"Exif\0\0garbage"),
    "large profile": b"".join(
        segment(2, b"ICC_PROFILE\0" + bytes([i, 60]) + os.urandom(65_000)) for i in range(1, 61)
    ),
    "fill bytes": b"\xff" * 9,
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_metadata_of_a_jpeg_is_no_reason_to_refuse_it(name):
    pixels = open_image(JPEG).tobytes()
    assert open_image(JPEG[:2] + SEGMENTS[name] + JPEG[2:]).tobytes() == pixels


def test_needed_metadata_is_kept():
    turned = PICTURE.transpose(Image.Transpose.ROTATE_270)
    data = PNG[:33] + CHUNKS["large profile"] + chunk(b"eXIf", TURNED) + PNG[33:]
    assert open_image(data).tobytes() == turned.tobytes()
    data = JPEG[:2] + segment(1, b"Exif\0\0" + TURNED) + SEGMENTS["large profile"] + JPEG[2:]
    assert open_image(data).size == turned.size
    one_colour = Image.new("RGB", (4, 4), (1, 2, 3))
    data = encoded(one_colour, "PNG", transparency=(1, 2, 3))
    data = data[:33] + CHUNKS["large compressed text"] + data[33:]
    assert open_image(data).getpixel((0, 0)) == (255, 255, 255)
    cmyk = encoded(PICTURE.convert("CMYK"), "JPEG")  # its Adobe segment says: inverted
    with Image.open(io.BytesIO(cmyk)) as wanted:
        assert open_image(cmyk).tobytes() == wanted.convert("RGB").tobytes()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_without_its_end_marker_is_whole(progressive, missing):
    data = encoded(PICTURE, "JPEG", progressive=progressive)
    assert open_image(data[:-missing]).tobytes() == open_image(data).tobytes()


def test_a_jpeg_that_lacks_pixels_is_refused():
    for missing in (12, 40, len(JPEG) // 2):
        with pytest.raises(ImageError, match="damaged or cut short"):
            open_image(JPEG[:-missing])


def test_a_webp_without_its_last_byte_is_read():
    data = encoded(PICTURE, "WEBP")
    wanted = np.asarray(open_image(data)).astype(int)
    for cut in (data[:-1], data[:4] + struct.pack("<I", len(data) + 100) + data[8:]):
        assert np.abs(np.asarray(open_image(cut)) - wanted).mean() < 1
    with pytest.raises(ImageError, match="damaged or cut short"):
        open_image(data[: len(data) // 2])


def test_a_file_of_nothing_but_metadata_takes_little_time():
    started = time.perf_counter()
    for data in (
        PNG[:33] + chunk(b"prVt", b"") * 500_000 + PNG[33:],
        JPEG[:2] + segment(2, b"") * 500_000 + JPEG[2:],
    ):
        with pytest.raises(ImageError, match="metadata"):
            open_image(data)
    assert time.perf_counter() - started < 10


def test_only_the_image_data_is_read(tmp_path):
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.write(PNG[:33] + struct.pack(">I", 2**31 - 1) + b"prVt")
        file.seek(2**31 + 3, io.SEEK_CUR)
        file.write(PNG[33:])
    before = _peak_memory()
    assert open_image(path).tobytes() == PICTURE.tobytes()
    assert _peak_memory() - before < 2**28


def _peak_memory() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# HEIC


@pytest.mark.parametrize("turned", [False, True])
def test_an_iphones_photo_is_read_upright(turned):
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    pillow_heif.register_heif_opener()
    opened = open_image(encoded(picture, "HEIF", exif=exif.tobytes()))
    assert opened.size == ((32, 64) if turned else (64, 32))
    red, _, blue = opened.getpixel((8, 8))
    assert blue > 200 > 50 > red


def test_heic_without_its_package_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    command = re.escape(install_command("heic"))
    with pytest.raises(ImageError, match=f"HEIC.*: {command}, or .*JPEG"):
        open_image(b"\0\0\0\x18ftypheic" + bytes(40))


def test_a_damaged_heic_says_so():
    pytest.importorskip("pillow_heif")
    with pytest.raises(ImageError, match="damaged or cut short"):
        open_image(b"\0\0\0\x18ftypheic" + bytes(40))


def test_the_range_file_reads_like_the_bytes_it_joins():
    source = io.BytesIO(bytes(range(100)))
    joined = io.BufferedReader(image_data._RangeFile(source, [(3, 9), (20, 21), (50, 80)], b"end"))
    wanted = bytes(range(100))[3:9] + bytes([20]) + bytes(range(50, 80)) + b"end"
    assert joined.read() == wanted
    for start in range(len(wanted) + 2):
        joined.seek(start)
        assert joined.read(9) == wanted[start : start + 9]
    assert joined.seek(-3, io.SEEK_END) == len(wanted) - 3
    assert joined.read() == b"end"
