"""Numbers for Prometheus."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..engine.messages import Answered, Drawn, Event, Piece

if TYPE_CHECKING:
    from ..engine.engine import Engine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters, histograms and gauges of one server, in a registry of its own."""

    def __init__(self, engine: Engine):
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "mlx_janus_requests", "Requests by route and status.", ("method", "route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "mlx_janus_request_seconds", "From a request's head to its reply's end.", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._first = Histogram(
            "mlx_janus_first_token_seconds", "From a request for answers, waiting included, to their first characters.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._prompt = Counter("mlx_janus_prompt_tokens", "Tokens of prompts, pictures included.", registry=registry)
        self._answer = Counter("mlx_janus_answer_tokens", "Tokens of answers.", registry=registry)
        self._pictures = Counter("mlx_janus_pictures", "Pictures drawn.", registry=registry)
        for name, what in {
            "waiting": "Requests that wait.",
            "answering": "Answers under way.",
            "drawing": "Pictures under way.",
        }.items():
            gauge = Gauge(f"mlx_janus_{name}", what, registry=registry)
            gauge.set_function(lambda name=name: getattr(engine.counts, name))  # type: ignore[misc]

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)

    def replied(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request whose reply is over."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def listener(self) -> Listener:
        """Something to tell the events of one request, from now on."""
        return Listener(self._first, self._prompt, self._answer, self._pictures)


class Listener:
    """Counts the events of one request."""

    def __init__(self, first: Histogram, prompt: Counter, answer: Counter, pictures: Counter):
        self._first, self._prompt, self._answer, self._pictures = first, prompt, answer, pictures
        self._begun, self._started = False, time.perf_counter()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Piece | Answered) and not self._begun:
            self._begun = True
            self._first.observe(time.perf_counter() - self._started)
        if isinstance(event, Answered):
            if event.index == 0:
                self._prompt.inc(event.result.prompt_tokens)
            self._answer.inc(len(event.result.tokens))
        if isinstance(event, Drawn):
            self._pictures.inc()
