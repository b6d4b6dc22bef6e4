"""Trials of one client: each is a function that raises an error if the client fails.

A script of this folder imports its client, defines trials and ends with ``run()``. The script runs
in the client's own environment, so this module needs only the standard library. ``run.py`` starts
the scripts and sets the variables that are read here.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import os
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = os.environ["JANUS_URL"]  # address of the server, without /v1
URL = f"{ROOT}/v1"
MODEL = "janus-tiny"
KEY = "none"
IMAGE = Path(os.environ["JANUS_IMAGE"])  # a PNG file: a red circle
IMAGE_URL = "data:image/png;base64," + base64.b64encode(IMAGE.read_bytes()).decode()
COLOR = "What color is the circle?"
RED = "red"  # the answer to COLOR
TOO_LONG = "red circle " * 2000  # more tokens than the model's context holds
_LOG = Path(os.environ["JANUS_LOG"])  # the server's log: a line for each request
_RESULTS = Path(os.environ["JANUS_RESULTS"])  # receives a line of JSON for each trial

_loop = asyncio.new_event_loop()  # one for all trials, because clients keep connections
_trials: list[tuple[str, Callable[[], Any], str, str]] = []


def trial(name: str, *, lacks: str = "", theirs: str = "") -> Callable[[Callable], Callable]:
    """Return a decorator that adds a function, which may be async, to the trials.

    Args:
        name: the tried feature, in a few words.
        lacks: the feature that the server does not support yet. The trial then fails, and the
            server has to refuse a request with a status from 400 to 499.
        theirs: the reason why the client itself fails.
    """

    def add(function: Callable) -> Callable:
        _trials.append((name, function, lacks, theirs))
        return function

    return add


def message(text: str = COLOR, *image_urls: str) -> dict[str, Any]:
    """Return a question about images, by default about the color of the circle."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in image_urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def check_refused(function: Callable[[], Any], kind: type[Exception], **attributes: Any) -> None:
    """Raise an error unless a function raises an error of this kind with these attributes."""
    try:
        function()
    except kind as error:
        found = {name: getattr(error, name, None) for name in attributes}
        if found != attributes:
            raise AssertionError(f"{found} of {error}") from error
    else:
        raise AssertionError("it was answered")


def text_of(chunks: Iterable[Any]) -> str:
    """Return the text of a stream's chunks, objects as OpenAI's package has them."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def check_red(text: Any) -> None:
    """Raise an error unless the text answers that the circle is red."""
    assert isinstance(text, str), repr(text)
    assert RED in text.lower(), repr(text)


def check_image(data: bytes | str | None) -> None:
    """Raise an error unless the data, as bytes or in base64, are an image file."""
    assert data, "no image"
    content = base64.b64decode(data) if isinstance(data, str) else data
    is_image = content.startswith((b"\x89PNG", b"\xff\xd8\xff")) or content[8:12] == b"WEBP"
    assert is_image, content[:40]


def fetch(url: str) -> bytes:
    """Return the bytes at an address of the server."""
    assert url.startswith(ROOT), url
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as reply:
        return reply.read()


def is_idle() -> bool:
    """Return whether the server has no request."""
    health = json.loads(fetch(f"{ROOT}/health"))
    return not any(health[name] for name in ("waiting", "answering", "drawing"))


def run(clean_up: Callable[[], Any] = lambda: None) -> None:
    """Run the trials, write their outcomes and end the program; ``clean_up`` is called last."""
    with _RESULTS.open("a", encoding="utf-8") as results:
        for name, function, lacks, theirs in _trials:
            logged = _LOG.stat().st_size
            error = _try(function)
            time.sleep(0.05)  # the server logs a request after its reply
            outcome = {
                "name": name,
                "lacks": lacks,
                "theirs": theirs,
                "error": error,
                "statuses": _statuses(logged),
            }
            results.write(json.dumps(outcome) + "\n")
            results.flush()
    clean_up()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some clients leave threads behind that would not end


def _try(function: Callable[[], Any]) -> str | None:
    """Call a trial. Return its error in one line, or None."""
    try:
        outcome = function()
        if inspect.isawaitable(outcome):
            _loop.run_until_complete(_await(outcome))
    except Exception as error:
        traceback.print_exc()
        return " ".join(f"{type(error).__name__}: {error}".split())[:600]
    return None


async def _await(outcome: Any) -> None:
    """Wait for a trial, at most two minutes."""
    await asyncio.wait_for(outcome, timeout=120)


def _statuses(start: int) -> list[int]:
    """Return the status of each request that the server has logged after byte ``start``."""
    with _LOG.open("rb") as log:
        log.seek(start)
        lines = log.read().decode(errors="replace").splitlines()
    words = [line.split(",")[0].split() for line in lines if line.startswith(("GET ", "POST "))]
    return [int(line[-1]) for line in words if line[-1].isdigit()]
