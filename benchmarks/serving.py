"""Measure the server under load, with many clients: ``python benchmarks/serving.py``.

The server runs in its own process, and OpenAI's client sends every request.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus

# isort: split
import httpx
import numpy as np
import psutil
from openai import APIStatusError, AsyncOpenAI
from PIL import Image

from benchmarks.machine import machine
from mlx_janus.evaluation.drawing import TASKS, drawing_prompts
from mlx_janus.processing.saved_images import encode_image
from mlx_janus.worlds import shapes

QUESTIONS = (
    "how many shapes are there?",
    "what is in the picture?",
    "describe the picture",
    "is there a red circle?",
)
_POOL = 12  # questions with known answers, and also prompts with known images


@dataclass(frozen=True)
class Question:
    """A question about an image, and its answer."""

    text: str
    image: str  # a data URL
    answer: str


@dataclass(frozen=True)
class Wish:
    """A prompt and a seed, and the pixels of their image."""

    prompt: str
    seed: int
    pixels: np.ndarray


@dataclass
class Load:
    """The outcome of many clients' requests."""

    answers: int = 0
    images: int = 0
    told_to_wait: int = 0
    wrong: Counter[str] = field(default_factory=Counter)  # by kind of fault
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"answer": [], "image": []})
    memory: list[int] = field(default_factory=list)  # resident bytes, every second


def known_outcomes(model: str) -> tuple[list[Question], list[Wish]]:
    """Return questions and prompts, with the library's own answers and images."""
    janus = mlx_janus.load(model)
    random = np.random.default_rng(11)
    questions = []
    for i in range(_POOL):
        image = shapes.render(shapes.sample_scene(random))
        text = QUESTIONS[i % len(QUESTIONS)]
        url = "data:image/png;base64," + base64.b64encode(encode_image(image, {})).decode()
        questions.append(Question(text, url, janus.generate_text(text, image).text))
    prompts = [
        wanted.prompt for task in TASKS for wanted in drawing_prompts(task, _POOL // len(TASKS), 0)
    ]
    wishes = []
    for seed, prompt in enumerate(prompts):
        image = janus.generate_images(prompt, seed=seed, exact=True)[0].image
        wishes.append(Wish(prompt, seed, np.asarray(image)))
    return questions, wishes


@contextlib.contextmanager
def server(model: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server; yield its address and its process."""
    command = [sys.executable, "-m", "mlx_janus", "serve"]
    command += ["--port", "0", "--quiet", "--model", model]
    root = str(Path(__file__).resolve().parent.parent)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise click.ClickException("the server did not start: pip install '.[server]'")
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()


def api(url: str) -> AsyncOpenAI:
    """Return OpenAI's client of a server, without retries after 429."""
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


async def ask(client: AsyncOpenAI, question: Question, *, first: bool = False) -> tuple[str, float]:
    """Return the answer, and the seconds to its end or, with ``first``, to its first characters."""
    parts = [
        {"type": "image_url", "image_url": {"url": question.image}},
        {"type": "text", "text": question.text},
    ]
    messages: Any = [{"role": "user", "content": parts}]
    started = time.perf_counter()
    text = ""
    began: float | None = None
    stream = await client.chat.completions.create(
        model="default", messages=messages, temperature=0, stream=True
    )
    async for chunk in stream:
        piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
        if piece and began is None:
            began = time.perf_counter()
        text += piece
    ended = time.perf_counter()
    return text, (began or ended if first else ended) - started


async def draw(client: AsyncOpenAI, wish: Wish, *, n: int = 1) -> tuple[np.ndarray, float]:
    """Return the first image's pixels, and the seconds to all images."""
    started = time.perf_counter()
    reply = await client.images.generate(
        model="default", prompt=wish.prompt, n=n, extra_body={"seed": wish.seed}
    )
    seconds = time.perf_counter() - started
    assert reply.data
    png = base64.b64decode(reply.data[0].b64_json or "")
    return np.asarray(Image.open(io.BytesIO(png))), seconds


async def load(
    url: str,
    process: psutil.Process,
    clients: int,
    seconds: float,
    questions: list[Question],
    wishes: list[Wish],
) -> Load:
    """Let many clients send requests for some seconds; each compares its replies."""
    found = Load()
    deadline = time.monotonic() + seconds

    async def client_work(number: int) -> None:
        """Send requests until the deadline; if the server refuses one, wait as it asks."""
        random = np.random.default_rng(number)
        async with api(url) as client:
            while time.monotonic() < deadline:
                try:
                    await one(client, random)
                except APIStatusError as error:
                    if error.status_code != 429:
                        found.wrong[f"status {error.status_code}"] += 1
                        continue
                    found.told_to_wait += 1
                    await asyncio.sleep(float(error.response.headers["Retry-After"]))
                except Exception as error:
                    found.wrong[type(error).__name__] += 1

    async def one(client: AsyncOpenAI, random: np.random.Generator) -> None:
        """Send a random request, and compare its reply with the library's."""
        if random.random() < 0.6:
            question = questions[random.integers(len(questions))]
            text, took = await ask(client, question)
            found.answers += 1
            found.seconds["answer"].append(took)
            found.wrong["another answer"] += text != question.answer
        else:
            wish = wishes[random.integers(len(wishes))]
            pixels, took = await draw(client, wish)
            found.images += 1
            found.seconds["image"].append(took)
            found.wrong["another image"] += not np.array_equal(pixels, wish.pixels)

    watching = asyncio.create_task(_watch_memory(process, found.memory))
    await asyncio.gather(*map(client_work, range(clients)))
    watching.cancel()
    return found


async def _watch_memory(process: psutil.Process, memory: list[int]) -> None:
    """Append the resident bytes of a process to a list, every second."""
    while True:
        memory.append(process.memory_info().rss)
        await asyncio.sleep(1)


async def first_words(
    url: str, questions: list[Question], wishes: list[Wish], rounds: int
) -> dict[str, float]:
    """Measure the time to an answer's first characters, idle and during image generation.

    Returns:
        Median seconds: "alone" and "beside N" to the first characters, without other requests and
        while N images are generated; "drawing of N" to the end of these images.
    """
    times: dict[str, list[float]] = {
        "alone": [],
        "beside 1": [],
        "beside 8": [],
        "drawing of 1": [],
        "drawing of 8": [],
    }
    async with api(url) as client, httpx.AsyncClient(base_url=url) as plain:
        for i in range(rounds):
            # The server keeps an image's features, so each image has only one question.
            one, other, third = (questions[(3 * i + k) % len(questions)] for k in range(3))
            times["alone"].append((await ask(client, one, first=True))[1])
            for n, question in ((1, other), (8, third)):
                drawing = asyncio.create_task(draw(client, wishes[0], n=n))
                while (await plain.get("/health")).json()["drawing"] < n:
                    await asyncio.sleep(0.01)
                times[f"beside {n}"].append((await ask(client, question, first=True))[1])
                times[f"drawing of {n}"].append((await drawing)[1])
    return {name: median(values) for name, values in times.items()}


async def together(url: str, wishes: list[Wish], rounds: int) -> tuple[float, float]:
    """Return the median seconds of 8 images one after the other, and of the same 8 at once."""
    times: dict[str, list[float]] = {"row": [], "once": []}
    async with api(url) as client:

        async def timed(name: str, work: Callable[[], Awaitable[Any]]) -> None:
            """Wait for some work, and append its seconds to the times of ``name``."""
            started = time.perf_counter()
            await work()
            times[name].append(time.perf_counter() - started)

        async def in_a_row() -> None:
            for wish in wishes[:8]:
                await draw(client, wish)

        for _ in range(rounds):
            await timed("row", in_a_row)
            await timed(
                "once", lambda: asyncio.gather(*(draw(client, wish) for wish in wishes[:8]))
            )
    return median(times["row"]), median(times["once"])


@click.command()
@click.option("-m", "--model", default="tiny", show_default=True, help="A folder or a Hub id.")
@click.option("--clients", type=int, default=32, show_default=True)
@click.option("--seconds", type=float, default=60, show_default=True, help="Duration of the load.")
@click.option(
    "--rounds", type=int, default=4, show_default=True, help="Rounds of the other measurements."
)
def main(model: str, clients: int, seconds: float, rounds: int) -> None:
    """Print the server's times under load, and the cost of concurrent answers and images."""
    questions, wishes = known_outcomes(model)
    with server(model) as (url, process):
        once = asyncio.run(together(url, wishes, rounds))
        words = asyncio.run(first_words(url, questions, wishes, rounds))
        found = asyncio.run(load(url, process, clients, seconds, questions, wishes))
    click.echo(f"Machine: {machine()}\n")
    row, at_once = once
    click.echo(f"8 images in a row {row:.2f} s, at once {at_once:.2f} s: ", nl=False)
    click.echo(f"{row / at_once:.2f} times as fast\n")
    click.echo("| to the first words of an answer about an image | seconds, median |\n|---|---|")
    click.echo(f"| with nothing else running | {words['alone']:.3f} |")
    for n in (1, 8):
        images = "1 image is" if n == 1 else f"{n} images are"
        whole = words[f"drawing of {n}"]
        answer = words[f"beside {n}"]
        click.echo(f"| while {images} generated, which takes {whole:.2f} s | {answer:.3f} |")
    print_load(found, clients, seconds)


def print_load(found: Load, clients: int, seconds: float) -> None:
    """Print the outcome of the load as a table."""
    wrong = {what: count for what, count in found.wrong.items() if count}
    after = found.memory[len(found.memory) // 4]
    end = found.memory[-1]
    click.echo(f"\n| {clients} clients, {seconds:g} s | |\n|---|---|")
    click.echo(f"| answers, images | {found.answers}, {found.images} |")
    for kind, times in found.seconds.items():
        click.echo(
            f"| seconds of {kind}s, median and longest | {median(times):.2f}, {max(times):.2f} |"
        )
    click.echo(f"| refused while the queue was full (429) | {found.told_to_wait} |")
    click.echo(f"| lost, mixed up, failed | {wrong or 'none'} |")
    memory = f"{after / 1e6:.0f} MB, {end / 1e6:.0f} MB"
    click.echo(f"| resident memory after a quarter, at the end | {memory} |")


if __name__ == "__main__":
    main()
