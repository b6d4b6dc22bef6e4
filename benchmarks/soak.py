"""Does a server keep its memory among clients that misbehave? ``python benchmarks/soak.py``.

The server first serves well-behaved clients alone, then for ``--seconds`` a mix of which a quarter
misbehaves, then nobody. The replies to the well-behaved ones are compared with the library's own.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus  # noqa: F401  OpenBLAS before MLX

# isort: split
import httpx
import numpy as np
from PIL import Image

from benchmarks.machine import machine
from benchmarks.serving import known_outcomes, load, print_load, server

_CHAT = "/v1/chat/completions"
_HELLO = [{"role": "user", "content": "hello"}]


def _large_images() -> list[str]:
    """Return data URLs of images that take much memory when decoded."""
    urls = []
    for size, kind, options in (
        ((8000, 6000), "JPEG", {}),
        ((6000, 5000), "PNG", {"compress_level": 1}),
        ((4000, 4000), "JPEG", {"progressive": True}),
    ):
        file = io.BytesIO()
        Image.new("RGB", size, "teal").save(file, kind, **options)
        data = base64.b64encode(file.getvalue()).decode()
        urls.append(f"data:image/{kind.lower()};base64,{data}")
    return urls


class Misbehaving:
    """Clients that do what no client should do, one thing after the other.

    Args:
        url: address of the server.
    """

    def __init__(self, url: str):
        self._url = url
        self._large = _large_images()
        self.done: Counter[str] = Counter()  # by kind

    async def run(self, number: int, deadline: float) -> None:
        """Misbehave until a time of ``time.monotonic``."""
        random = np.random.default_rng([7, number])
        kinds = [
            self._leave_a_stream,
            self._leave_half_a_request,
            self._stay_idle,
            self._read_nothing,
            self._send_wrong_values,
            self._send_garbage,
            self._send_a_large_image,
            self._send_a_large_body,
        ]
        while time.monotonic() < deadline:
            kind = kinds[int(random.integers(len(kinds)))]
            with contextlib.suppress(OSError, httpx.HTTPError):
                await kind(random)
            self.done[kind.__name__.strip("_").replace("_", " ")] += 1

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=60)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self._url)
        return await asyncio.open_connection(parts.hostname, parts.port)

    async def _leave_a_stream(self, random: np.random.Generator) -> None:
        prompt = f"a red circle {random.integers(1 << 30)}"
        body = {"prompt": prompt, "stream": True, "partial_images": 4}
        async with (
            self._client() as client,
            client.stream("POST", "/v1/images/generations", json=body) as reply,
        ):
            async for _ in reply.aiter_bytes():
                return

    async def _leave_half_a_request(self, random: np.random.Generator) -> None:
        _, writer = await self._connect()
        head = f"POST {_CHAT} HTTP/1.1\r\nHost: {urlsplit(self._url).netloc}\r\n"
        writer.write(f"{head}Content-Length: 5000000\r\n\r\n".encode())
        writer.write(b"x" * int(random.integers(1, 4_000_000)))
        await writer.drain()
        writer.close()

    async def _stay_idle(self, random: np.random.Generator) -> None:
        _, writer = await self._connect()
        await asyncio.sleep(float(random.uniform(0, 3)))
        writer.close()

    async def _read_nothing(self, random: np.random.Generator) -> None:
        _, writer = await self._connect()
        body = json.dumps({"prompt": "a blue star", "n": 4, "seed": int(random.integers(99))})
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {urlsplit(self._url).netloc}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        await writer.drain()
        await asyncio.sleep(1)
        writer.transport.abort()

    async def _send_wrong_values(self, random: np.random.Generator) -> None:
        async with self._client() as client:
            await client.post(_CHAT, json={"messages": _HELLO, "stop": [1] * 100_000})

    async def _send_garbage(self, random: np.random.Generator) -> None:
        _, writer = await self._connect()
        writer.write(random.bytes(int(random.integers(1, 100_000))))
        await writer.drain()
        writer.close()

    async def _send_a_large_image(self, random: np.random.Generator) -> None:
        url = self._large[int(random.integers(len(self._large)))]
        content = [{"type": "image_url", "image_url": {"url": url}}]
        async with self._client() as client:
            await client.post(
                _CHAT, json={"messages": [{"role": "user", "content": content}], "max_tokens": 2}
            )

    async def _send_a_large_body(self, random: np.random.Generator) -> None:
        message = [{"role": "user", "content": "x" * 30_000_000}]
        async with self._client() as client:
            await client.post(_CHAT, json={"messages": message})


@click.command(help=__doc__)
@click.option("-m", "--model", default="tiny", show_default=True, help="A folder or a Hub id.")
@click.option("--clients", default=24, show_default=True, help="A quarter of them misbehaves.")
@click.option("--seconds", default=300.0, show_default=True, help="Duration of the mixed load.")
def main(model: str, clients: int, seconds: float) -> None:
    """Print the resident memory before, during and after the load."""
    questions, wishes = known_outcomes(model)
    bad = max(clients // 4, 1)
    with server(model) as (url, process):
        asyncio.run(load(url, process, clients - bad, 20, questions, wishes))
        before = process.memory_info().rss
        misbehaving = Misbehaving(url)

        async def mixed() -> None:
            deadline = time.monotonic() + seconds
            others = [misbehaving.run(number, deadline) for number in range(bad)]
            good = load(url, process, clients - bad, seconds, questions, wishes)
            found, *_ = await asyncio.gather(good, *others)
            print_load(found, clients - bad, seconds)
            print(f"| largest resident memory | {max(found.memory) / 1e6:.0f} MB |")

        click.echo(f"Machine: {machine()}")
        asyncio.run(mixed())
        time.sleep(10)
        after = process.memory_info().rss
    print(f"| before the load, 10 s after it | {before / 1e6:.0f} MB, {after / 1e6:.0f} MB |")
    for kind, count in sorted(misbehaving.done.items()):
        print(f"| {kind} | {count} |")


if __name__ == "__main__":
    main()
