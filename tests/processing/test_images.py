"""Images in: an upright opaque RGB image or one ImageError. Images out: none is lost."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import stat
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, PngImagePlugin
from safetensors.numpy import load_file

from mlx_janus.config import ImageConfig
from mlx_janus.errors import ImageError, OptionError, OutputError
from mlx_janus.processing import images
from mlx_janus.processing.images import open_image, preprocess, resize_and_pad, to_image
from mlx_janus.processing.saved_images import numbered_paths, read_metadata, save_image
from tests.support.golden import FIXTURES
from tests.support.programs import ROOT

GOLDEN = FIXTURES / "deepseek-pro-bin.golden.safetensors"
RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load_file(GOLDEN)


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    planes = np.stack(
        [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) % 256], axis=-1
    )
    return Image.fromarray(planes.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = (
        png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + png_chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for row in np.asarray(image).tolist() for pixel in row]


def same(a: Image.Image, b: Image.Image, within: int = 0) -> bool:
    if (a.mode, a.size) != (b.mode, b.size):
        return False
    difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
    return bool(difference.max() <= within)


def refused(source, *words: str) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(ImageError) as caught:
        open_image(source)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# The reference


@pytest.mark.parametrize("i", range(8))
def test_preprocessing_is_the_references(golden, i):
    picture = Image.fromarray(golden[f"image.{i}.rgb"])
    config = ImageConfig(image_size=64)
    # The reference ran on Pillow 13; older ones round some bytes of tall images the other way.
    steps = 0 if int(PIL.__version__.split(".")[0]) >= 13 else 1
    resized = np.asarray(resize_and_pad(picture, config)).transpose(2, 0, 1).astype(int)
    assert np.abs(resized - golden[f"image.{i}.resized"]).max() <= steps
    pixels = preprocess(picture, config)
    assert pixels.dtype == np.float32
    assert pixels.shape == (64, 64, 3)
    wanted = golden[f"image.{i}.pixel_values"]
    np.testing.assert_allclose(pixels.transpose(2, 0, 1), wanted, rtol=0, atol=1e-6 + steps / 127.5)


def test_drawn_pixels_become_the_references_bytes(golden):
    for name in ("vq.dec", "gen.image"):
        wanted = golden["vq.dec_u8" if name == "vq.dec" else "gen.image_u8"]
        for pixels, bytes_ in zip(golden[name].transpose(0, 2, 3, 1), wanted, strict=True):
            image = to_image(pixels)
            assert (image.mode, image.size) == ("RGB", (64, 64))
            different = np.asarray(image).astype(int) - bytes_
            exact = (pixels.astype(np.float64) + 1) / 2 * 255
            on_an_edge = np.abs(exact - np.round(exact)) < 1e-4
            assert not different[~on_an_edge].any()
            assert np.abs(different).max() <= 1


def test_drawn_pixels_are_clipped_and_truncated():
    pixels = np.array([[[-7.0, -1.0, -0.9999], [0.0, 1.0, 9.0], [np.nan, np.inf, -np.inf]]])
    assert np.asarray(to_image(pixels)).tolist() == [[[0, 0, 0], [127, 255, 255], [0, 255, 0]]]
    assert to_image(np.full((2, 3, 3), 0.999, dtype=np.float16)).getpixel((0, 0)) == (254,) * 3


@given(width=st.integers(1, 1500), height=st.integers(1, 1500), size=st.sampled_from([16, 64, 384]))
@example(width=47, height=47, size=384)  # where int(h * (384 / m)) gives 383
@example(width=1, height=1500, size=384)
@settings(deadline=None, max_examples=60)
def test_sides_are_truncated_and_the_result_is_square(width, height, size):
    config = ImageConfig(image_size=size, background=(0, 0, 255))
    square = np.asarray(resize_and_pad(Image.new("RGB", (width, height), RED), config))
    assert square.shape == (size, size, 3)
    inside = (square == RED).all(axis=-1)
    longest = max(width, height)
    for axis, side in ((1, width), (0, height)):
        wanted = max(side * size // longest, 14)
        extent = np.flatnonzero(inside.any(axis=1 - axis))
        assert len(extent) == wanted
        assert extent[0] == (size - wanted) // 2
    assert (square[~inside] == BLUE).all()


@given(width=st.integers(1, 100_000), height=st.integers(1, 100_000))
def test_side_formula_is_whole_division(width, height):
    longest = max(width, height)
    for side in (width, height):
        assert int(side / longest * 384) == side * 384 // longest


def test_smallest_side_may_exceed_the_size():
    assert resize_and_pad(gradient(), ImageConfig(image_size=8, min_size=14)).size == (8, 8)
    assert resize_and_pad(gradient(1, 900), ImageConfig(image_size=8, min_size=14)).size == (8, 8)


def test_mean_and_std_are_per_channel():
    config = ImageConfig(image_size=16, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    pixels = preprocess(Image.new("RGB", (4, 4), WHITE), config)
    np.testing.assert_allclose(pixels[3, 3], (1.0, 1.0, 0.0), atol=1e-6)


# Pictures of every kind


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "ICO"])
def test_lossless_formats(tmp_path, kind):
    path = tmp_path / f"picture.{kind.lower()}"
    gradient(16, 16).save(path, kind)
    for source in (path, str(path), path.read_bytes()):
        assert same(open_image(source), gradient(16, 16))


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "WEBP", "GIF", "AVIF"])
def test_lossy_formats(tmp_path, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    path = tmp_path / "picture.of_any_name"
    gradient().save(path, kind)
    assert same(open_image(path), gradient(), within=60)


def test_the_suffix_does_not_matter_and_files_are_closed(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(gradient(), "BMP"))
    mode = path.stat().st_mode
    path.chmod(0o400)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        assert same(open_image(path), gradient())
    path.chmod(mode)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_read(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(encoded(gradient(), "PNG"),))
    writer.start()
    assert same(open_image(path), gradient())
    writer.join()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(kind, turn):
    upright = gradient()
    moves = {  # EXIF: where the stored first row and first column belong in the upright picture
        1: lambda p: p,  # top, left
        2: lambda p: p[:, ::-1],  # top, right
        3: lambda p: p[::-1, ::-1],  # bottom, right
        4: lambda p: p[::-1],  # bottom, left
        5: lambda p: p.transpose(1, 0, 2),  # left, top
        6: lambda p: p[:, ::-1].transpose(1, 0, 2),  # right, top
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: lambda p: p[::-1].transpose(1, 0, 2),  # left, bottom
    }
    stored = Image.fromarray(np.ascontiguousarray(moves[turn](np.asarray(upright))))
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    opened = open_image(data)
    assert same(opened, upright)
    assert same(open_image(opened), upright), "opened twice, turned twice"
    with Image.open(io.BytesIO(data)) as lazy:
        assert same(open_image(lazy), upright)


def test_orientation_of_a_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (32, 16), RED)
    picture.paste(BLUE, (0, 0, 16, 16))
    opened = open_image(encoded(picture, "JPEG", exif=exif))
    assert opened.size == (16, 32)
    top, bottom = opened.getpixel((8, 4)), opened.getpixel((8, 28))
    assert top[2] > 200 > 50 > top[0]
    assert bottom[0] > 200 > 50 > bottom[2]


@pytest.mark.parametrize("tiff", [b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"])
def test_broken_exif_does_not_hide_a_picture(tiff):
    exif = b"Exif\0\0" + tiff
    assert open_image(encoded(gradient(), "JPEG", exif=exif)).size == (24, 16)
    assert same(open_image(encoded(gradient(), "PNG", exif=exif)), gradient())


def test_transparency_is_laid_over_white():
    clear_red = Image.new("RGBA", (2, 1), (*RED, 0))
    clear_red.putpixel((1, 0), (*RED, 255))
    assert colours(open_image(encoded(clear_red, "PNG"))) == [WHITE, RED]
    half = open_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 51)), "PNG"))
    assert half.getpixel((0, 0)) == (204, 204, 204)
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (9, 255))
    assert colours(open_image(encoded(grey, "PNG"))) == [WHITE, (9, 9, 9)]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparent_modes_in_memory(mode):
    picture = Image.new("RGBA" if mode != "La" else "LA", (4, 4), 0)
    if mode == "PA":
        picture = Image.new("PA", (4, 4), (0, 0))
        picture.putpalette([10, 20, 30])
    elif picture.mode != mode:
        picture = picture.convert(mode)
    assert same(open_image(picture), Image.new("RGB", (4, 4), WHITE))


def test_opaque_alpha_changes_nothing():
    picture = gradient()
    picture.putalpha(255)
    assert same(open_image(picture), gradient())


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry(kind):
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *BLUE])
    picture.putpixel((1, 0), 1)
    assert colours(open_image(encoded(picture, kind))) == [RED, BLUE]
    data = encoded(picture, kind, transparency=0)
    assert colours(open_image(data)) == [WHITE, BLUE]


def test_palette_with_an_alpha_for_each_entry():
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, *BLUE])
    picture.putpixel((1, 0), 1)
    data = encoded(picture, "PNG", transparency=bytes([51, 255]))
    assert colours(open_image(data)) == [(204, 204, 204), BLUE]


@pytest.mark.parametrize(
    ("mode", "key", "other"),
    [("RGB", RED, BLUE), ("L", 7, 200), ("1", 0, 255), ("I;16", 1000, 40000)],
)
def test_a_transparent_colour(mode, key, other):
    picture = Image.new(mode, (2, 1), key)
    picture.putpixel((1, 0), other)
    first, second = colours(open_image(encoded(picture, "PNG", transparency=key)))
    assert first == WHITE
    grey = other * 255 // 65535 + 1 if mode == "I;16" else other
    assert second == (other if mode == "RGB" else (grey,) * 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV", "RGBX", "CMYK", "LAB"])
def test_other_modes(mode):
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.profileToProfile(gradient(), srgb, lab, outputMode="LAB")
    else:
        picture = gradient().convert(mode)
    opened = open_image(picture)
    assert (opened.mode, opened.size) == ("RGB", (24, 16))
    if mode in ("1", "L", "P", "YCbCr", "CMYK"):
        assert same(opened, picture.convert("RGB"))


def test_cmyk_jpeg():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = open_image(encoded(ink, "JPEG")).getpixel(
        (8, 8)
    )  # Pillow writes Adobe's inverted kind
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled(kind):
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    opened = open_image(encoded(Image.fromarray(values), kind))
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
    assert np.ptp(np.asarray(opened), axis=-1).max() == 0


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16L", "I;16B"])
def test_deep_grey_modes_in_memory(mode):
    assert open_image(Image.new(mode, (2, 2), 65535)).getpixel((0, 0)) == WHITE
    assert open_image(Image.new(mode, (2, 2), 257 * 100)).getpixel((1, 1)) == (100,) * 3
    assert open_image(Image.new(mode, (2, 2), 0)).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 99.6, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 1e4, 2e4], [0, 128, 255]),
        ([np.nan, np.inf, 0.5], [0, 255, 128]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
        ([0.0, np.inf, 1.0], [0, 255, 255]),
    ],
)
def test_float_grey(values, wanted):
    picture = Image.fromarray(np.array([values], dtype=np.float32))
    assert picture.mode == "F"
    assert np.asarray(open_image(encoded(picture, "TIFF")))[0, :, 1].tolist() == wanted


def test_wide_integers_are_stretched():
    values = np.array([[-(2**31), 0, 2**31 - 1]], dtype=np.int32)
    assert np.asarray(open_image(Image.fromarray(values)))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE, WHITE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as check:
        assert check.n_frames == 3
    assert same(open_image(data), frames[0])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16", "F", "CMYK"])
def test_a_callers_image_is_not_modified(mode):
    picture = (
        gradient().convert("L").convert("I").convert(mode)
        if mode == "I;16"
        else gradient().convert(mode)
    )
    picture.info.update(comment="kept")
    picture.getexif()[0x0112] = 6
    before = (
        picture.mode,
        picture.size,
        picture.tobytes(),
        dict(picture.info),
        dict(picture.getexif()),
    )
    opened = open_image(picture)
    assert before == (
        picture.mode,
        picture.size,
        picture.tobytes(),
        dict(picture.info),
        dict(picture.getexif()),
    )
    assert opened is not picture
    opened.paste(0, (0, 0, 4, 4))
    assert picture.tobytes() == before[2]
    assert not opened.info


# Refusals


def test_not_a_picture(tmp_path):
    def put(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    missing = tmp_path / "absent.png"
    refused(missing, str(missing), "does not exist")
    refused(str(tmp_path), str(tmp_path), "folder")
    refused("", "folder")
    refused(tmp_path / "absent" / "a.png", "does not exist")
    refused(put("a", b"x") / "b.png", "cannot be opened")
    refused(put("empty.png", b""), "empty.png", "empty")
    refused(put("words.png", b"not a picture at all, but words\n" * 9), "words.png", "use PNG")
    refused(
        put("model.safetensors", struct.pack("<Q", 2) + b"{}"), "model.safetensors", "not an image"
    )
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9\n"
    refused(put("pointer.png", pointer), "pointer.png", "Git LFS pointer", "git lfs pull")
    refused(put("paper.pdf", b"%PDF-1.7\n1 0 obj"), "paper.pdf", "PDF", "PNG")
    refused(
        put("logo.svg", b'<?xml version="1.0"?>\n<SVG width="9"></SVG>'), "logo.svg", "SVG", "PNG"
    )
    refused(
        put("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "page.eps",
        "not an image",
    )
    refused("https://example.org/cat.png", "web address", "download")
    refused("with\0nul.png", "cannot be opened")
    refused("x" * 5000 + ".png", "cannot be opened")
    refused("two\nlines.png", "two\\nlines.png", "does not exist")
    refused(b"\0" * 64, "the image given as bytes", "not an image")
    refused(b"", "the image given as bytes", "empty")
    refused(io.BytesIO(b"abc"), "the image in the open file", "not an image")
    for foreign in (7, None):
        with pytest.raises(OptionError, match=f"got {type(foreign).__name__}"):
            open_image(foreign)


def test_bytes_paths(tmp_path):
    class BytesPath:
        def __fspath__(self) -> bytes:
            return os.fsencode(tmp_path / "a.png")

    gradient().save(tmp_path / "a.png")
    assert same(open_image(BytesPath()), gradient())


def test_only_raster_formats_are_tried(tmp_path):
    assert not {"EPS", "WMF", "PDF", "PSD", "FITS", "GBR"} & set(images._FORMATS)
    for kind in ("EPS", "PCX", "TGA", "JPEG2000"):
        path = tmp_path / f"picture.{kind.lower()}"
        gradient().save(path, kind)
        refused(path, "not an image")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    gradient().save(path)

    def denied(self, mode="r"):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    refused(path, "secret.png", "may not be read", "chmod")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_for_real(tmp_path):
    path = tmp_path / "secret.png"
    gradient().save(path)
    path.chmod(0)
    refused(path, "secret.png", "may not be read")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncated(tmp_path, kind):
    path = tmp_path / f"cut.{kind.lower()}"
    data = encoded(gradient(200, 200), kind)
    path.write_bytes(data[: len(data) // 2])
    refused(path, path.name, "damaged or cut short")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_cut_in_the_header(kind):
    refused(encoded(gradient(), kind)[:14], "given as bytes", "damaged or cut short")


def test_zero_sized():
    for size in ((0, 0), (0, 5), (5, 0)):
        refused(Image.new("RGB", size), "PIL image", f"{size[0]} x {size[1]}")
    refused(png_header(0, 7))
    refused(b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b",\0\0\0\0\0\0\0\0\0\x02\0;")
    refused(b"P6 0 0 255\n")


@pytest.mark.parametrize("size", [(10_001, 10_000), (15_000, 15_000), (2**31 - 1, 2**31 - 1)])
def test_too_large_is_seen_in_the_header(tmp_path, monkeypatch, size):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(*size))
    refused(path, "huge.png", "100 megapixels", "smaller")


def test_between_pillows_warning_and_our_limit(monkeypatch):
    limit = Image.MAX_IMAGE_PIXELS
    refused(
        png_header(10_000, 9_900), "damaged"
    )  # 99 megapixels: Pillow warns of a bomb, which must not surface
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 16)
    assert open_image(gradient(24, 16)).size == (24, 16)
    refused(gradient(25, 16), "(25 x 16)")
    refused(encoded(gradient(25, 16), "PNG"), "(25 x 16)")
    refused(encoded(gradient(25, 16), "JPEG", progressive=True), "(25 x 16)")
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_refusal_names_the_size_the_limit_and_the_fix():
    with pytest.raises(ImageError) as caught:
        open_image(png_header(12_000, 9_000))
    assert str(caught.value) == (
        "the image given as bytes takes 432 MB when decoded (12000 x 9000), more than 400 MB "
        "(100 megapixels): make it smaller, or save it as a baseline JPEG, which may have 400 "
        "megapixels"
    )
    with pytest.raises(ImageError, match=r"takes 900 MB when decoded \(225,000,000 pixels\)"):
        open_image(png_header(15_000, 15_000))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_above_the_limit_is_decoded_at_half_its_size(monkeypatch, mode):
    picture = gradient(65, 49).convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(picture, "JPEG", exif=exif)
    whole = open_image(data)
    monkeypatch.setattr(images, "MAX_PIXELS", 65 * 49)
    assert same(open_image(data), whole)
    monkeypatch.setattr(images, "MAX_PIXELS", 65 * 49 - 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would refuse to open it
    half = open_image(data)
    assert half.size == (25, 33)
    np.testing.assert_allclose(np.array(half), np.array(whole.resize((25, 33))), atol=30)
    assert same(open_image(data.removesuffix(b"\xff\xd9")), half)  # without its end marker
    monkeypatch.setattr(images, "MAX_PIXELS", 25 * 33)
    assert open_image(data).size == (25, 33)
    monkeypatch.setattr(images, "MAX_PIXELS", 25 * 33 - 1)
    refused(data, "(65 x 49)")


def test_a_jpeg_of_several_scans_is_not_halved(monkeypatch):
    """Its decoder collects the scans at full size, so half the size would save no memory."""
    monkeypatch.setattr(images, "MAX_PIXELS", 60 * 40 - 1)
    data = bytearray(encoded(gradient(60, 40), "JPEG"))
    assert open_image(bytes(data)).size == (30, 20)
    data[data.index(b"\xff\xda") + 4] = 1  # the first scan is of one colour of three
    refused(bytes(data), "(60 x 40)")
    refused(encoded(gradient(60, 40), "JPEG", progressive=True), "(60 x 40)")


MEASURE = """
import re, resource, sys
from pathlib import Path
from mlx_janus.processing import images

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux, ru_maxrss begins with the parent's.
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

images.Image.init()
before = peak()
images.open_image(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform not in ("darwin", "linux"), reason="measures as these do")
@pytest.mark.parametrize(
    ("mode", "suffix", "size"),
    [("RGB", ".jpg", (8160, 6144)), ("RGBA", ".png", (5000, 4000)), ("I;16", ".png", (5000, 4000))],
)
def test_decoding_takes_two_images_of_memory(tmp_path, mode, suffix, size):
    """A phone's photo of 50 megapixels, upright by its EXIF, takes 0.4 GB."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path / f"large{suffix}"
    Image.new(mode, size).save(path, exif=exif, compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    pixels = size[0] * size[1]
    assert 5 * pixels < int(done.stdout) < 8 * pixels + 40_000_000


def test_a_frame_larger_than_its_icon_says(monkeypatch):
    icon = bytearray(encoded(gradient(64, 64), "ICO", sizes=[(64, 64)]))
    icon[6:8] = bytes([8, 8])
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    refused(bytes(icon), "megapixels")


ODD = [
    SyntaxError,
    ValueError,
    struct.error,
    EOFError,
    zlib.error,
    OverflowError,
    IndexError,
    KeyError,
    TypeError,
]
ODD += [
    AttributeError,
    RuntimeError,
    AssertionError,
    ZeroDivisionError,
    RecursionError,
    OSError,
    NotImplementedError,
]


@pytest.mark.parametrize("error", ODD)
def test_odd_exceptions_of_decoders(monkeypatch, error):
    def load(self):
        warnings.warn("odd", stacklevel=1)
        raise error("odd\nlines")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    refused(encoded(gradient(), "PNG"), "given as bytes", "damaged or cut short")


def test_no_memory(monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    refused(encoded(gradient(), "PNG"), "memory")


def test_a_closed_image_is_refused(tmp_path):
    gradient().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pass
    refused(picture, "PIL image")


def test_warnings_do_not_surface_and_filters_are_kept():
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"
    data = encoded(gradient(), "JPEG", exif=exif)
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        open_image(data)
        with ThreadPoolExecutor(8) as pool:
            assert all(p.size == (24, 16) for p in pool.map(open_image, [data] * 64))
    assert not seen
    assert filters == list(warnings.filters)


FUZZED = {
    "PNG": encoded(gradient().convert("P"), "PNG", transparency=3),
    "JPEG": encoded(gradient(), "JPEG", exif=Image.Exif()),
    "GIF": encoded(gradient(), "GIF", save_all=True, append_images=[Image.new("RGB", (24, 16))]),
    "WEBP": encoded(gradient(), "WEBP"),
    "TIFF": encoded(gradient(), "TIFF", compression="tiff_lzw"),
    "BMP": encoded(gradient(), "BMP"),
    "ICO": encoded(gradient(16, 16), "ICO"),
    "PPM": encoded(gradient(), "PPM"),
}


def survives(data: bytes) -> None:
    with contextlib.suppress(ImageError):
        opened = open_image(data)
        assert opened.mode == "RGB"
        assert min(opened.size) > 0


@pytest.mark.parametrize("kind", FUZZED)
def test_damage_of_any_kind_is_an_image_error(kind, monkeypatch):
    monkeypatch.setattr(
        images, "MAX_PIXELS", 10**6
    )  # keeps flipped sizes from taking the test's time
    data, rng = FUZZED[kind], random.Random(kind)
    for _ in range(250):
        damaged = bytearray(data)
        for _ in range(rng.randrange(4)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.4:
            del damaged[rng.randrange(len(data)) :]
        survives(bytes(damaged))


@given(
    st.binary(max_size=300),
    st.sampled_from([d[:n] for d in FUZZED.values() for n in (0, 4, 12, 40)]),
)
@settings(deadline=None, max_examples=100)
def test_noise_after_a_true_beginning(noise, start):
    survives(start + noise)


# Pictures out


def test_save_png(tmp_path):
    text = {
        "prompt": "une élève",
        "seed": "7",
        "caption": "一只猫 🐈",
        "nul": "a\0b",
        "byte": "a\udcffb",
    }
    path = save_image(gradient(), tmp_path / "out.png", text)
    assert path == tmp_path / "out.png"
    with Image.open(path) as written:
        assert same(written, gradient())
        assert written.text == {**text, "nul": "ab", "byte": "a?b"}
        assert list(written.text) == sorted(text)
    data = path.read_bytes()
    assert data.count(b"tEXt") == 4
    assert data.count(b"iTXt") == 1
    again = save_image(gradient(), tmp_path / "again.png", dict(reversed(text.items())))
    assert again.read_bytes() == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.png", "out.png"]


def test_suffixes(tmp_path, monkeypatch):
    assert save_image(gradient(), tmp_path / "out", {}) == tmp_path / "out.png"
    assert save_image(gradient(), str(tmp_path / "Loud.PNG"), {}) == tmp_path / "Loud.PNG"
    assert save_image(gradient(), tmp_path / "cat v1.5", {}) == tmp_path / "cat v1.5.png"
    assert save_image(gradient(), tmp_path / "no.2 of all", {}) == tmp_path / "no.2 of all.png"
    monkeypatch.chdir(tmp_path)
    assert save_image(gradient(), "here.png", {}) == Path("here.png")
    written = len(list(tmp_path.iterdir()))
    for name in ("out.gif", "out.tiff", "out.png.txt"):
        with pytest.raises(OutputError, match=r"only \.png, \.jpg and \.webp are written"):
            save_image(gradient(), tmp_path / name, {})
        with pytest.raises(OutputError, match=r"only \.png, \.jpg and \.webp are written"):
            numbered_paths(name, 2)
    for folder in (tmp_path, "", ".", "new/", "here.png/"):
        with pytest.raises(OutputError, match="is a folder"):
            save_image(gradient(), folder, {})
        with pytest.raises(OutputError, match="is a folder"):
            numbered_paths(folder, 2)
    assert len(list(tmp_path.iterdir())) == written


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_other_formats_keep_the_metadata(tmp_path, suffix):
    metadata = {"prompt": "une élève 🐈", "seed": "7", "nul": "a\0b", "byte": "a\udcffb"}
    path = save_image(gradient(), tmp_path / f"out{suffix}", metadata)
    assert path == tmp_path / f"out{suffix}"
    assert read_metadata(path) == {**metadata, "nul": "ab", "byte": "a?b"}
    with Image.open(path) as written:
        assert written.format == ("WEBP" if suffix == ".webp" else "JPEG")
    opened = np.asarray(open_image(path)).astype(int)
    assert np.abs(opened - np.asarray(gradient())).mean() < 6
    assert save_image(gradient(), path, metadata).name == f"out_2{suffix}"


def test_metadata_that_a_jpeg_cannot_hold(tmp_path):
    metadata = {"prompt": "x" * 70_000}
    with pytest.raises(OutputError, match=r"64 KB of a JPEG, name it \.png or \.webp"):
        save_image(gradient(), tmp_path / "out.jpg", metadata)
    assert not list(tmp_path.iterdir())
    for name in ("out.webp", "out.png"):
        assert read_metadata(save_image(gradient(), tmp_path / name, metadata)) == metadata


def test_metadata_of_other_programs_are_read_past(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0not JSON"
    for kind in ("JPEG", "WEBP"):
        path = tmp_path / f"a.{kind.lower()}"
        for options in ({"exif": exif}, {"exif": b"Exif\0\0garbage"}, {}):
            gradient().save(path, kind, **options)
            assert read_metadata(path) == {}
    path = tmp_path / "a.png"
    bomb = png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(9_000_000)))
    broken = png_chunk(b"tEXt", b"a\0b")[:-1] + b"!"
    png = encoded(gradient(), "PNG")
    path.write_bytes(png[:33] + bomb + broken + png_chunk(b"tEXt", b"seed\x007") + png[33:])
    assert read_metadata(path) == {"seed": "7"}


def test_a_file_that_exists_is_kept(tmp_path):
    first = tmp_path / "out.png"
    first.write_text("precious")
    (tmp_path / "out_3.png").symlink_to(tmp_path / "nowhere")
    assert save_image(gradient(), first, {}).name == "out_2.png"
    assert save_image(gradient(), first, {}).name == "out_4.png"
    assert save_image(gradient(), tmp_path / "out", {}).name == "out_5.png"
    assert first.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs a umask")
def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = save_image(gradient(), tmp_path / "out.png", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_threads_never_lose_a_picture(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(
            pool.map(
                lambda i: save_image(Image.new("L", (1, 1), i), tmp_path / "out.png", {}), range(40)
            )
        )
    assert len(set(paths)) == 40
    assert sorted(Image.open(p).getpixel((0, 0)) for p in paths) == list(range(40))
    assert len(list(tmp_path.iterdir())) == 40


SAVER = """
import sys
from PIL import Image
from mlx_janus.processing.saved_images import save_image
for i in range(10):
    print(save_image(Image.new("L", (1, 1), int(sys.argv[1]) * 10 + i), sys.argv[2], {}))
"""


def test_processes_never_lose_a_picture(tmp_path):
    out = str(tmp_path / "out.png")
    command = [sys.executable, "-c", SAVER]
    running = [
        subprocess.Popen([*command, str(i), out], cwd=ROOT, stdout=subprocess.PIPE)
        for i in range(4)
    ]
    paths = [
        line for process in running for line in process.communicate(timeout=60)[0].decode().split()
    ]
    assert len(set(paths)) == 40
    assert sorted(Image.open(p).getpixel((0, 0)) for p in paths) == list(range(40))
    assert len(list(tmp_path.iterdir())) == 40


def test_missing_folder_is_not_made(tmp_path):
    with pytest.raises(OutputError, match=r"make the folder .*deep first"):
        save_image(gradient(), tmp_path / "deep" / "out.png", {})
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a folder"):
        save_image(gradient(), tmp_path / "file" / "out.png", {})
    with pytest.raises(OutputError, match="shorter name"):
        save_image(gradient(), tmp_path / f"{'x' * 400}.png", {})
    with pytest.raises(OutputError, match="cannot be written"):
        save_image(gradient(), f"{tmp_path}/nul\0.png", {})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "choose another folder"),
        (errno.EROFS, "choose another folder"),
        (errno.EIO, "choose another file or folder"),
    ],
)
@pytest.mark.parametrize("step", ["write", "claim", "move"])
def test_failures_leave_nothing_behind(tmp_path, monkeypatch, code, fix, step):
    (tmp_path / "out.png").touch()

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    real = Path.open

    def half_written(self, mode="r"):
        with real(self, mode) as file:
            file.write(b"half")
        fail()

    patches = {
        "write": (Path, "open", half_written),
        "claim": (os, "open", fail),
        "move": (Path, "replace", fail),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*patches[step])
        with pytest.raises(OutputError, match=fix) as caught:
            save_image(gradient(), tmp_path / "out.png", {})
    assert str(tmp_path / "out.png") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
    assert not (tmp_path / "out.png").read_bytes()


def test_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_image(gradient(), tmp_path / "out.png", {})
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, sys
from PIL import Image
from mlx_janus.errors import OutputError
from mlx_janus.processing.saved_images import save_image
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
try:
    save_image(Image.new("L", (99, 99)), sys.argv[1], {})
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
def test_a_file_that_may_not_grow(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "out.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "out.png cannot be written" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere"
)
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="choose another folder"):
        save_image(gradient(), tmp_path / "out.png", {})
    tmp_path.chmod(0o700)


def test_an_image_that_png_cannot_hold(tmp_path):
    with pytest.raises(OutputError, match="CMYK"):
        save_image(Image.new("CMYK", (2, 2)), tmp_path / "out.png", {})
    assert not list(tmp_path.iterdir())


def test_numbered_paths(tmp_path):
    assert numbered_paths("a/out.png", 1) == [Path("a/out.png")]
    assert numbered_paths("a/out.png", 3) == [
        Path("a/out-1.png"),
        Path("a/out-2.png"),
        Path("a/out-3.png"),
    ]
    assert numbered_paths(Path("out"), 2) == [Path("out-1.png"), Path("out-2.png")]
    with pytest.raises(OutputError, match="is a folder"):
        numbered_paths(tmp_path, 2)


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """Each scan costs the time of the whole image: this one would take a minute."""
    side = 3000
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    few, many = tmp_path / "few.jpg", tmp_path / "many.jpg"
    few.write_bytes(data[:-2] + last_scan * 5 + data[-2:])
    many.write_bytes(data[:-2] + last_scan * 3000 + data[-2:])
    assert open_image(few).size == (side, side)
    start = time.process_time()
    with pytest.raises(ImageError, match=r"many\.jpg has 30\d\d scans of 3000 x 3000 pixels"):
        open_image(many)
    assert time.process_time() - start < 2
