"""Calls of the tools: from arguments to a request of the engine, from its events to content."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any

from mcp_types import ContentBlock, ImageContent, TextContent

from ..decode.sampling import random_seed
from ..decode.text import TextOptions
from ..engine.engine import CANNOT_EDIT, Engine
from ..engine.messages import (
    Answered,
    AnswerRequest,
    DrawingRequest,
    Drawn,
    Event,
    Piece,
    Progress,
    Request,
    edit_arguments,
)
from ..errors import OptionError, OutputError
from ..inference.input_records import InputImage
from ..inference.pathway import EditingPathway, ImageOptions
from ..inference.results import GeneratedImage
from ..processing.prompts import Turn
from ..processing.saved_images import encode_image
from .host import Host
from .progress import ProgressReporter
from .tools import (
    ASK,
    EDIT,
    GENERATE,
    AskArguments,
    EditArguments,
    GenerateArguments,
    check_arguments,
)

_Tool = Callable[[Engine, ProgressReporter], Awaitable[list[ContentBlock]]]

_SAMPLING = ("cfg_weight", "temperature", "steps")
_MAX_RESULT = 1_000_000  # characters of base64; Claude Desktop refuses results above 1 MB
_EDIT_SAMPLING = (*_SAMPLING, "cfg_weight2")


class ToolCalls:
    """The tools of a host.

    Args:
        host: gives the engine, and reads and saves images.
    """

    def __init__(self, host: Host):
        self._host = host

    async def call(
        self, name: str, arguments: dict[str, Any] | None, progress: ProgressReporter
    ) -> list[ContentBlock]:
        """Call a tool, and return the content of its result.

        If the caller is cancelled, the engine stops the work within a step.

        Args:
            name: the tool.
            arguments: the arguments as the client sent them; None: none.
            progress: reports the progress of the call.

        Raises:
            OptionError: there is no such tool, or an argument is wrong.
            Exception: the call fails. ``Host.explain`` describes the error.
        """
        run = self._tool_with_arguments(name, arguments)
        async with AsyncExitStack() as stack:
            entering = stack.enter_async_context(self._host.engine())
            engine = await progress.wait(entering, "loading the model")
            return await run(engine, progress)

    def _tool_with_arguments(self, name: str, arguments: dict[str, Any] | None) -> _Tool:
        """Check the arguments of a call; return the tool as a function that has them already.

        Raises:
            OptionError: there is no such tool, or an argument is wrong.
        """
        if name == GENERATE:
            return partial(self._generate, check_arguments(GenerateArguments, arguments))
        if name == EDIT:
            return partial(self._edit, check_arguments(EditArguments, arguments))
        if name == ASK:
            return partial(self._ask, check_arguments(AskArguments, arguments))
        raise OptionError(f"there is no tool {name!r}: use {GENERATE}, {ASK} or {EDIT}")

    async def _generate(
        self, arguments: GenerateArguments, engine: Engine, progress: ProgressReporter
    ) -> list[ContentBlock]:
        """Draw images from a prompt."""
        sampling = {name: getattr(arguments, name) for name in _SAMPLING}
        options = engine.pathway.options(sampling)  # a None takes the model's default
        return await self._draw(engine, _drawing_request(arguments, options, progress), progress)

    async def _edit(
        self, arguments: EditArguments, engine: Engine, progress: ProgressReporter
    ) -> list[ContentBlock]:
        """Draw images from given ones and a prompt.

        Raises:
            OptionError: the model cannot change images.
        """
        pathway = engine.pathway
        if not isinstance(pathway, EditingPathway):
            raise OptionError(CANNOT_EDIT)
        sampling = {name: getattr(arguments, name) for name in _EDIT_SAMPLING}
        options = pathway.edit_options(sampling)
        images = [
            await progress.wait(self._host.read_image(source, engine), "reading the images")
            for source in arguments.images
        ]
        request = _drawing_request(arguments, options, progress, images)
        return await self._draw(engine, request, progress)

    async def _ask(
        self, arguments: AskArguments, engine: Engine, progress: ProgressReporter
    ) -> list[ContentBlock]:
        """Answer a question about an image."""
        options = TextOptions(
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            seed=random_seed(),
        )
        reading = self._host.read_image(arguments.image, engine)
        image = await progress.wait(reading, "reading the image")
        request = AnswerRequest(
            (Turn("user", arguments.question, images=1),),
            (image.image,),
            options,
            with_progress=progress.wanted,
        )
        prompt_tokens = 0  # length of the prompt; 0 until the first ``Progress`` event
        pieces = 0
        async with aclosing(self._events(engine, request, progress)) as events:
            async for event in events:
                total = prompt_tokens + arguments.max_tokens
                if isinstance(event, Progress):
                    prompt_tokens = event.total
                    total = prompt_tokens + arguments.max_tokens
                    await progress.report(event.done, total, "reading the prompt")
                elif isinstance(event, Piece):
                    pieces += 1
                    await progress.report(prompt_tokens + pieces, total, "writing the answer")
                elif isinstance(event, Answered):
                    return _answer_content(event)
        raise AssertionError("a request ends with its answer")

    async def _draw(
        self, engine: Engine, request: DrawingRequest, progress: ProgressReporter
    ) -> list[ContentBlock]:
        """Draw images, and return them with a line about their seeds."""
        drawn: list[Drawn] = []
        async with aclosing(self._events(engine, request, progress)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    await progress.report(event.done, event.total, "drawing")
                elif isinstance(event, Drawn):
                    drawn.append(event)
        drawn.sort(key=lambda event: event.index)  # images may have finished in any order
        images = [event.image for event in drawn]
        content: list[ContentBlock] = [*await asyncio.to_thread(_image_content, images)]
        line = f"{_describe(images)}{await self._save(images)}."
        return [*content, TextContent(text=line)]

    async def _save(self, images: Sequence[GeneratedImage]) -> str:
        """Save images if the host saves any.

        Returns:
            The end of the line about the images: their files, or why they could not be saved; "" if
            the host saves none. Images that could not be saved are sent all the same.
        """
        try:
            paths = [await self._host.save(image) for image in images]
        except OutputError as error:
            return f"; not saved: {error}"
        files = ", ".join(str(path) for path in paths if path is not None)
        return f"; saved as {files}" if files else ""

    async def _events(
        self, engine: Engine, request: Request, progress: ProgressReporter
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of a request. Closing the generator cancels the request."""
        ticket = engine.submit(request)
        record = self._host.recorder()
        try:
            while True:
                try:
                    event = await progress.wait(anext(ticket), "waiting for the model")
                except StopAsyncIteration:
                    return
                record(event)
                yield event
        finally:
            ticket.cancel()


def _drawing_request(
    arguments: GenerateArguments | EditArguments,
    options: ImageOptions,
    progress: ProgressReporter,
    images: Sequence[InputImage] = (),
) -> DrawingRequest:
    """Return the engine's request for images."""
    return DrawingRequest(
        arguments.prompt,
        options,
        random_seed() if arguments.seed is None else arguments.seed,
        arguments.n,
        with_progress=progress.wanted,
        **edit_arguments(images),
    )


def _image_content(images: Sequence[GeneratedImage]) -> list[ImageContent]:
    """Return images as content: PNGs with their settings, or JPEGs if the PNGs are too large."""
    files = [encode_image(image.image, image.metadata) for image in images]
    mime_type = "image/png"
    encoded = [base64.b64encode(file).decode("ascii") for file in files]
    if sum(map(len, encoded)) > _MAX_RESULT:
        files = [encode_image(image.image, {}, ".jpg") for image in images]
        mime_type = "image/jpeg"
        encoded = [base64.b64encode(file).decode("ascii") for file in files]
    return [ImageContent(data=data, mime_type=mime_type) for data in encoded]


def _describe(images: Sequence[GeneratedImage]) -> str:
    """Return the beginning of the line about drawn images: their number, size and seeds."""
    width, height = images[0].image.size
    seeds = ", ".join(str(image.seed) for image in images)
    if len(images) == 1:
        return f"One image of {width} x {height} pixels, seed {seeds}"
    return f"{len(images)} images of {width} x {height} pixels, seeds {seeds}"


def _answer_content(event: Answered) -> list[ContentBlock]:
    """Return the content of an answer, with a note if it was cut."""
    result = event.result
    content: list[ContentBlock] = [TextContent(text=result.text)]
    if result.finish_reason == "length":
        tokens = f"{len(result.tokens)} tokens"
        cut = f"The answer was cut after {tokens}, by max_tokens or the model's context."
        content.append(TextContent(text=cut))
    return content
