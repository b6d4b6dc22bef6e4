"""Images as text."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from mlx_janus.errors import ImageError
from mlx_janus.processing.data_urls import as_data_url, base64_part, decode_base64

LIMIT = 1000  # bytes


def encoded(format_name: str) -> str:
    file = io.BytesIO()
    Image.effect_noise((16, 16), 50).convert("RGB").save(file, format_name)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_base64_of_an_image_is_known_from_its_first_bytes(format_name: str) -> None:
    text = encoded(format_name)
    url = as_data_url(text)
    part = base64_part(url, 10_000)
    assert part == text
    assert decode_base64(part) == base64.b64decode(text)


@pytest.mark.parametrize(
    "text",
    [
        "picture.png",
        "/9j/",
        "/9j/folder/" + "a" * 100 + ".jpg",
        "Qk.png",
        "a" * 100,
        "https://example.org/AAAA",
        "data:image/png;base64,AAAA",
    ],
)
def test_paths_and_addresses_are_not_taken_for_base64(text: str) -> None:
    assert as_data_url(text) == text


def test_lines_and_missing_padding_are_accepted() -> None:
    assert decode_base64("AAEC\nAwQ") == bytes(range(5))
    with pytest.raises(ImageError, match="damaged or cut short"):
        decode_base64("AAE!")


def test_what_is_too_large_is_refused_before_it_is_decoded() -> None:
    url = "data:image/png;base64," + "A" * 1336
    assert base64_part(url, LIMIT) == "A" * 1336
    with pytest.raises(ImageError, match=r"larger than 0\.001 MB"):
        base64_part(url + "AAAA", LIMIT)
    assert base64_part("picture.png", LIMIT) is None
