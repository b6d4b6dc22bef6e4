"""An engine that answers and draws as told, as slowly as told, to test the server before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from mlx_janus.config import JanusConfig
from mlx_janus.decode.grammar import Grammar
from mlx_janus.engine.messages import (
    Answered,
    AnswerRequest,
    BusyError,
    DrawingRequest,
    Drawn,
    Event,
    Partial,
    Piece,
    Request,
)
from mlx_janus.engine.tickets import Counts
from mlx_janus.errors import PromptError
from mlx_janus.inference.pathway import ImagePathway
from mlx_janus.inference.pathways import pathway_of
from mlx_janus.inference.results import GeneratedImage, TextResult
from mlx_janus.processing.prompts import Turn


@dataclass
class FakeEngine:
    """What the routes use of ``Engine``.

    Args:
        config: of the model it says it is.
        pieces: of every answer.
        pause: seconds before each event.
        room: requests at once; more are refused.
        failure: what comes after the first event of each request.
    """

    config: JanusConfig
    name: str = "fake"
    pieces: tuple[str, ...] = ("A red", " circle", ".")
    pause: float = 0.0
    room: int = 64
    failure: Exception | None = None
    stopping: bool = False
    asked: list[Request] = field(default_factory=list)
    open: int = 0

    def reset(self) -> None:
        """What it was when it was made."""
        self.__init__(self.config)  # type: ignore[misc]

    @property
    def pathway(self) -> ImagePathway:
        """Of the model it says it is; checks options."""
        return pathway_of(SimpleNamespace(config=self.config))  # type: ignore[arg-type]

    @property
    def counts(self) -> Counts:
        """All that is open counts as answers."""
        return Counts(answering=self.open)

    def check_grammar(self, grammar: Grammar) -> None:
        """As ``Engine.check_grammar``; it refuses nothing."""

    def conversation_ids(self, turns: Sequence[Turn], system: str | None = None) -> list[int]:
        """As ``Engine.conversation_ids``; each word is a token, and each image four."""
        if not any(turn.role == "user" for turn in turns):
            raise PromptError("there is no question: add a message of the user")
        words = " ".join([system or "", *(turn.text for turn in turns)]).split()
        return list(range(len(words) + 4 * sum(turn.images for turn in turns)))

    def text_ids(self, text: str, *, with_bos: bool = True) -> list[int]:
        """As ``Engine.text_ids``; each word is a token."""
        return list(range(len(text.split()) + with_bos))

    def spelling(self, token_id: int) -> str:
        """As ``Engine.spelling``."""
        return str(token_id)

    def text_of(self, ids: Sequence[int]) -> str:
        """As ``Engine.text_of``."""
        return " ".join(map(str, ids))

    def submit(self, request: Request) -> FakeTicket:
        """As ``Engine.submit``."""
        if self.open >= self.room:
            raise BusyError(7)
        if isinstance(request, DrawingRequest) and not request.prompt.strip():
            raise PromptError("the prompt is empty: describe the image to draw")
        self.asked.append(request)
        return FakeTicket(self, request)


class FakeTicket:
    """As ``Ticket``."""

    def __init__(self, engine: FakeEngine, request: Request):
        self._engine, self._open = engine, True
        engine.open += 1
        self._events = self._run(_events(engine, request))

    async def _run(self, events: list[Event]) -> AsyncIterator[Event]:
        for number, event in enumerate(events):
            await asyncio.sleep(self._engine.pause)
            if number and self._engine.failure is not None:
                raise self._engine.failure
            yield event
        self.cancel()

    def __aiter__(self) -> FakeTicket:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)  # type: ignore[arg-type]

    def cancel(self) -> None:
        """As ``Ticket.cancel``."""
        self._engine.open -= self._open
        self._open = False


def _events(engine: FakeEngine, request: Request) -> list[Event]:
    events: list[Event] = []
    if isinstance(request, AnswerRequest):
        for index in range(request.n):
            events += [Piece(index, text) for text in engine.pieces]
            events.append(Answered(index, _result("".join(engine.pieces), len(engine.pieces))))
        return events
    side = engine.config.image_size
    for index in range(request.n):
        grey = Image.new("RGB", (side, side), "grey")
        events += [Partial(index, number, grey) for number in range(request.partial_images)]
        metadata = {"prompt": request.prompt, "seed": str(request.seed + index)}
        tokens = np.zeros(engine.pathway.steps(request.options), np.int32)
        events.append(
            Drawn(
                index,
                GeneratedImage(
                    grey, tokens, request.seed + index, request.prompt, metadata, steps=len(tokens)
                ),
                5 + 132 * len(request.images),
                132 * len(request.images),
            )
        )
    return events


def _result(text: str, tokens: int) -> TextResult:
    facts: dict[str, Any] = {"prompt_tps": 1.0, "generation_tps": 1.0, "peak_memory": 0}
    return TextResult(
        text, tuple(range(tokens)), "stop", prompt_tokens=10, cached_tokens=4, **facts
    )
