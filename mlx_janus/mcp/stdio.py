"""The tools on stdin and stdout, for one client that has started this process.

stdout belongs to the protocol: while the client is served, anything else that is printed there
appears on stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mcp.server.stdio import stdio_server
from PIL import Image

from ..engine.engine import Engine
from ..engine.messages import Event, StoppingError
from ..inference.input_records import InputImage, input_image
from ..inference.results import GeneratedImage
from ..processing.data_urls import as_data_url, base64_part, decode_base64
from ..processing.images import decode_image, open_image
from ..processing.web import fetch_public
from .protocol import create_server

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

_MAX_IMAGE_BYTES = 40_000_000  # bytes of an image that a client sends or names by its address
_CLOSING_SECONDS = 1.5  # clients kill a server that has not ended 2 seconds after stdin has
_SIGNAL_EXIT = 128  # plus the number of the signal: the exit code


def run_stdio(
    load: Callable[[], JanusPipeline],
    *,
    explain: Callable[[Exception], str],
    report: Callable[[str], None],
    output_folder: Path | None = None,
) -> None:
    """Serve the tools until the client closes stdin. Call it in the main thread.

    The model is loaded in the background, so the client gets its first replies at once. SIGINT and
    SIGTERM end the process.

    Args:
        load: returns the model; called in the engine's thread, and again after a failure.
        explain: returns one line about an error.
        report: prints a line to stderr.
        output_folder: existing folder to which images are saved; None: they are not saved.
    """
    asyncio.run(_serve(LocalHost(load, explain, report, output_folder)))


async def _serve(host: LocalHost) -> None:
    """Serve the client on stdin and stdout until stdin ends."""
    loop = asyncio.get_running_loop()
    endings: set[asyncio.Task[None]] = set()  # references, so that no task is lost

    def end(number: int) -> None:
        """End the process after a signal. A second signal does not wait for the model."""
        if endings:
            os._exit(_SIGNAL_EXIT + number)
        endings.add(loop.create_task(host.end_process(_SIGNAL_EXIT + number)))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end, number)
    server = create_server(host)
    host.start_loading()
    try:
        async with stdio_server() as (read_stream, write_stream):
            await server.run(read_stream, write_stream, server.create_initialization_options())
    except* (BrokenPipeError, ConnectionError):  # the client has left without closing stdin
        pass
    finally:
        if not await host.close():
            os._exit(0)  # a model that is downloading or loading cannot be interrupted


class LocalHost:
    """A ``Host`` that works for one user on this machine.

    Images may be files that the user can read, and public https addresses.

    Args:
        load: returns the model.
        explain: returns one line about an error.
        report: prints a line to stderr.
        output_folder: existing folder to which images are saved; None: they are not saved.
    """

    def __init__(
        self,
        load: Callable[[], JanusPipeline],
        explain: Callable[[Exception], str],
        report: Callable[[str], None],
        output_folder: Path | None = None,
    ):
        self.saves_images = output_folder is not None
        self.explain = explain
        self._load = load
        self._report = report
        self._output_folder = output_folder
        # The task of the newest attempt to load the model; None: none so far.
        self._loading: asyncio.Task[Engine] | None = None
        self._engine: Engine | None = None  # the engine of that attempt

    def start_loading(self) -> None:
        """Start an engine and load its model in the background."""
        self._engine = Engine(self._load)
        self._loading = asyncio.create_task(self._start(self._engine))
        # Read the error, even if no call waits for this attempt. Otherwise asyncio would log it as
        # never retrieved.
        self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _start(self, engine: Engine) -> Engine:
        """Start an engine and return it. Report on stderr how it went."""
        try:
            await engine.start()
        except StoppingError:  # the client has left while the model was loading
            raise
        except Exception as error:
            self._report(f"Error: {self.explain(error)}")
            raise
        self._report(f"{engine.name} is ready")
        return engine

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        """Yield the started engine. If the last attempt has failed, try to load again.

        Raises:
            Exception: the model cannot be loaded.
        """
        loading = self._loading
        if loading is None or (loading.done() and not _has_started(loading)):
            self.start_loading()
        assert self._loading is not None
        yield await asyncio.shield(self._loading)  # a cancelled call must not stop the loading

    async def read_image(self, source: str, engine: Engine) -> InputImage:
        """Return an image, scaled and padded for the vision encoder, with its record.

        Args:
            source: the path or the file:// address of a file, an https address with a public host,
                a data URL, or base64.
            engine: gives the size.

        Raises:
            ImageError: the image cannot be read, or its address is not public.
        """

        def read() -> InputImage:
            image, content = _read(source)
            return input_image(image, content, engine.config.image)

        return await asyncio.to_thread(read)

    async def save(self, image: GeneratedImage) -> Path | None:
        """Save an image in the output folder, and return its path; None: there is no folder.

        Raises:
            OutputError: the file cannot be written.
        """
        if self._output_folder is None:
            return None
        path = self._output_folder / f"janus-{image.seed}.png"
        return await asyncio.to_thread(image.save, path)

    def recorder(self) -> Callable[[Event], None]:
        """Return a function that counts nothing."""
        return lambda event: None

    async def close(self) -> bool:
        """Close the engine, and return whether its thread has ended within ``_CLOSING_SECONDS``."""
        if self._engine is None:  # there is no thread
            return True
        closing = asyncio.create_task(self._engine.close(0))
        done, _ = await asyncio.wait({closing}, timeout=_CLOSING_SECONDS)
        return bool(done)

    async def end_process(self, code: int) -> None:
        """Close the engine and end the process.

        The thread that reads stdin waits for the client's next line, which may never come, so the
        interpreter cannot end in its usual way.
        """
        with contextlib.suppress(Exception):
            await self.close()
        os._exit(code)


def _has_started(loading: asyncio.Task[Engine]) -> bool:
    """Return whether an attempt to load, which has ended, gave an engine that takes requests."""
    failed = loading.cancelled() or loading.exception() is not None
    return not failed and not loading.result().stopping


def _read(source: str) -> tuple[Image.Image, str | bytes]:
    """Return an image as it is, upright and RGB; and the path or the bytes of its file.

    Raises:
        ImageError: the image cannot be read, or its address is not public.
    """
    encoded = base64_part(as_data_url(source), _MAX_IMAGE_BYTES)
    if encoded is not None:
        data = decode_base64(encoded)
        return decode_image(data, "the image"), data
    if source[:8].lower() == "https://":
        # A language model chooses the address, perhaps as a page that it has read tells it to. So
        # it must not reach this machine's network.
        data = fetch_public(source, max_bytes=_MAX_IMAGE_BYTES)
        return decode_image(data, source), data
    path = os.path.expanduser(source)  # noqa: PTH111  Path.expanduser may fail
    return open_image(path), path
