"""Images of a request: no image, too large, elsewhere on the web, or good."""

from __future__ import annotations

import base64
import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx_janus

# isort: split
import httpx
import numpy as np
import pytest
from PIL import Image

from mlx_janus.processing import web
from mlx_janus.server import images as reading
from tests.support.fake_engine import FakeEngine
from tests.support.serving import CHAT, refusal, served, still_works, to


def png(width: int, height: int, *, noise: bool = False) -> str:
    """A data URL of a picture."""
    pixels = (
        np.random.default_rng(0).integers(0, 256, (height, width, 3))
        if noise
        else np.zeros((height, width, 3))
    )
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return data_url(file.getvalue())


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def bomb() -> str:
    """A data URL of a picture that says it is 50,000 x 50,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return data_url(data + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))


def ask(*urls: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]
    }


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (png(200, 200, noise=True), "larger than 0.05 MB"),
        (bomb(), "megapixels"),
        (data_url(b"GIF89a, and no more"), "damaged"),
        (data_url(b"%PDF-1.7"), "PDF"),
        (data_url(b""), "empty"),
        ("data:image/png;base64,!!!!", "base64 is damaged"),
        ("data:image/png;base64,iVBORw0KGgo", "damaged"),
        ("data:image/png;base64,iVBORw0KG", "base64 is damaged"),
        ("data:image/png;base64,é", "base64 is damaged"),
        ("data:image/png,abc", "must be given as data:"),
        (data_url(b"<svg/>", "text/html"), "must be given as data:"),
        ("", "must be given as data:"),
        ("photo.png", "must be given as data:"),
        ("/etc/passwd", "must be given as data:"),
        ("file:///etc/passwd", "must be given as data:"),
        ("http://127.0.0.1/a.png", "must be given as data:"),
        ("ftp://example.org/a.png", "must be given as data:"),
        ("https://example.org/a.png", "fetches no images"),
    ],
)
def test_a_picture_that_is_none(
    client: httpx.Client, engine: FakeEngine, url: str, words: str
) -> None:
    error = refusal(client.post(CHAT, json=ask(png(8, 8), url)), 400)
    assert words in error["message"]
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert not engine.asked
    still_works(client, engine)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/a.png",
        "https://localhost/a.png",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/a.png",
        "https://10.0.0.1/a.png",
    ],
)
def test_addresses_of_this_network_are_not_fetched(engine: FakeEngine, url: str) -> None:
    with served(engine, allow_url_images=True) as address, to(address) as client:
        error = refusal(client.post(CHAT, json=ask(url)), 400)
        assert "is not a public address" in error["message"]
        assert (
            "must be given as data:image/png;base64,... or an https address"
            in refusal(client.post(CHAT, json=ask(url.replace("https", "http"))), 400)["message"]
        )
        assert not engine.asked
        still_works(client, engine)


def test_an_address_is_fetched_where_that_is_allowed(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[str, int]]()

    def fetch(url: str, *, max_bytes: int) -> bytes:
        asked.append((url, max_bytes))
        return base64.b64decode(png(8, 8).partition(",")[2])

    monkeypatch.setattr(web, "fetch_public", fetch)
    with served(engine, allow_url_images=True, image_limit=1234) as address, to(address) as client:
        assert client.post(CHAT, json=ask("https://example.org/a.png")).status_code == 200
    assert asked == [("https://example.org/a.png", 1234)]


def test_a_long_address_is_refused_before_it_is_looked_at(engine: FakeEngine) -> None:
    with served(engine, allow_url_images=True) as address, to(address) as client:
        started = time.perf_counter()
        error = refusal(client.post(CHAT, json=ask("https://" + "ä." * 90_000 + "x/")), 400)
        assert "4096 characters" in error["message"]
        assert time.perf_counter() - started < 0.5  # to put it in ASCII takes longer
        assert not engine.asked


def test_line_breaks_do_not_count_for_the_size(client: httpx.Client, engine: FakeEngine) -> None:
    """The server with small limits takes 50,000 bytes."""

    def in_lines(size: int) -> str:
        picture = base64.b64decode(png(8, 8).partition(",")[2])
        kind, _, data = data_url(picture + bytes(size - len(picture))).partition(",")
        lines = (data[i : i + 76] for i in range(0, len(data), 76))
        return f"{kind}," + "\r\n".join(lines)

    assert client.post(CHAT, json=ask(in_lines(50_000))).status_code == 200
    assert len(engine.asked) == 1
    error = refusal(client.post(CHAT, json=ask(in_lines(50_001))), 400)
    assert "larger than 0.05 MB" in error["message"]


def test_base64_as_others_write_it(client: httpx.Client, engine: FakeEngine) -> None:
    kind, _, data = next(
        url for side in range(8, 30) if (url := png(side, 8)).endswith("=")
    ).partition(",")
    lines = "\r\n".join(data[i : i + 76] for i in range(0, len(data), 76))
    unended = data.rstrip("=")
    urls = [
        f"{kind},{lines}",
        f"{kind},{unended}",
        f"data:image/png;charset=utf-8;base64,{data}",
        f"data:application/octet-stream;base64,{data}",
    ]
    assert client.post(CHAT, json=ask(*urls)).status_code == 200
    assert len({picture.tobytes() for picture in engine.asked[0].images}) == 1  # type: ignore[union-attr]


def test_pictures_without_words(client: httpx.Client, engine: FakeEngine) -> None:
    part = {"type": "image_url", "image_url": {"url": png(8, 8)}}
    for content in ([part], [part, {"type": "text", "text": ""}]):
        said = [{"role": "user", "content": content}]
        assert client.post(CHAT, json={"messages": said}).status_code == 200
    assert [request.turns[0].images for request in engine.asked] == [1, 1]  # type: ignore[union-attr]


def test_a_picture_of_many_pixels_is_refused_before_it_is_unpacked() -> None:
    file = io.BytesIO()
    Image.new("1", (12_000, 9_000)).save(file, "PNG")
    with served(FakeEngine(mlx_janus.load().config)) as address, to(address) as client:
        error = refusal(client.post(CHAT, json=ask(data_url(file.getvalue()))), 400)
    limit = "the image takes 432 MB when decoded (12000 x 9000), more than 400 MB (100 megapixels)"
    assert error["message"].startswith(limit)


def test_a_phones_photo_of_50_megapixels() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8160, 6144), "red").save(file, "JPEG")
    photo = file.getvalue() + bytes(30_000_000 - len(file.getvalue()))
    engine = FakeEngine(mlx_janus.load().config)
    with served(engine) as address, to(address) as client:
        reply = client.post(CHAT, json=ask(data_url(photo, "image/jpeg")))
    assert reply.status_code == 200, reply.text
    (image,) = engine.asked[0].images  # type: ignore[union-attr]
    assert image.getpixel((32, 32)) == (254, 0, 0)


def test_images_of_all_requests_are_decoded_one_at_a_time(
    engine: FakeEngine, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding: list[int] = []
    at_once: list[int] = []

    def decode(data: bytes, name: str) -> Image.Image:
        decoding.append(1)
        at_once.append(len(decoding))
        time.sleep(0.02)
        decoding.pop()
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(reading, "decode_image", decode)
    with ThreadPoolExecutor(4) as pool:
        bodies = [ask(png(8, 8), png(8, 8))] * 4
        replies = list(pool.map(lambda body: client.post(CHAT, json=body), bodies))
    assert [reply.status_code for reply in replies] == [200] * 4
    assert at_once == [1] * 8


def test_too_many_pictures(client: httpx.Client, engine: FakeEngine) -> None:
    refusal(client.post(CHAT, json=ask(*[png(8, 8)] * 17)), 400)
    assert client.post(CHAT, json=ask(*[png(8, 8)] * 16)).status_code == 200
    assert len(engine.asked[0].images) == 16  # type: ignore[union-attr]


def test_pictures_are_kept_small(client: httpx.Client, engine: FakeEngine) -> None:
    assert client.post(CHAT, json=ask(png(3000, 2000))).status_code == 200
    side = engine.config.image_size
    assert [picture.size for picture in engine.asked[0].images] == [(side, side)]  # type: ignore[union-attr]
