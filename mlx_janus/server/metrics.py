"""Metrics for Prometheus."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..engine.messages import Answered, Drawn, Event, Piece

if TYPE_CHECKING:
    from ..engine.engine import Engine

# Seconds: upper bounds of the histograms' buckets.
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAUGES = {  # name of a field of ``Counts`` -> description
    "waiting": "Requests in the queue.",
    "answering": "Answers being generated.",
    "drawing": "Images being generated.",
}


class Metrics:
    """Counters, histograms and gauges of one server, in a registry of their own.

    Args:
        engine: the gauges show its counts, which are read at each scrape.
    """

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "mlx_janus_requests",
            "Requests by route and status.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "mlx_janus_request_seconds",
            "Seconds from a request's headers to the end of its reply.",
            ("route",),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._first_token_seconds = Histogram(
            "mlx_janus_first_token_seconds",
            "Seconds from a chat request to its answer's first characters, queueing included.",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "mlx_janus_prompt_tokens",
            "Tokens of chat prompts, images included.",
            registry=self._registry,
        )
        self._answer_tokens = Counter(
            "mlx_janus_answer_tokens", "Tokens of answers.", registry=self._registry
        )
        self._images = Counter("mlx_janus_pictures", "Images generated.", registry=self._registry)
        for name, description in _GAUGES.items():
            gauge = Gauge(f"mlx_janus_{name}", description, registry=self._registry)
            # ``name=name`` binds this name. Otherwise all gauges would read the last name's count.
            gauge.set_function(lambda name=name: getattr(engine.counts, name))  # type: ignore[misc]

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request whose reply has ended, and record the seconds that it took."""
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def event_recorder(self) -> EventRecorder:
        """Return a recorder for the events of one request; its clock starts now."""
        return EventRecorder(
            self._first_token_seconds, self._prompt_tokens, self._answer_tokens, self._images
        )


class EventRecorder:
    """A callable that counts the events of one request.

    Args:
        first_token_seconds: receives the seconds from this object's creation until the first answer
            begins.
        prompt_tokens: grows by the prompt's tokens, once for all answers.
        answer_tokens: grows by the tokens of every answer.
        images: grows by one for every finished image.
    """

    def __init__(
        self,
        first_token_seconds: Histogram,
        prompt_tokens: Counter,
        answer_tokens: Counter,
        images: Counter,
    ):
        self._first_token_seconds = first_token_seconds
        self._prompt_tokens = prompt_tokens
        self._answer_tokens = answer_tokens
        self._images = images
        self._started = time.perf_counter()
        self._answer_begun = False  # whether any answer of the request has begun

    def __call__(self, event: Event) -> None:
        """Count one event."""
        # An answer without text has no ``Piece``: ``Answered`` is its first event.
        if isinstance(event, Piece | Answered) and not self._answer_begun:
            self._answer_begun = True
            self._first_token_seconds.observe(time.perf_counter() - self._started)
        if isinstance(event, Answered):
            if event.index == 0:  # the answers of a request share one prompt
                self._prompt_tokens.inc(event.result.prompt_tokens)
            self._answer_tokens.inc(len(event.result.tokens))
        if isinstance(event, Drawn):
            self._images.inc()
