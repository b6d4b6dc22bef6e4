"""Answering: mlx-lm's generation loop over prepared embeddings, with keyed sampling and stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step

from ..config import MAX_SEED
from ..errors import OptionError
from ..models.backbone import Cache
from ..models.janus import JanusModel
from .sampling import check_number, check_whole, choose

MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class TextOptions:
    """How an answer is chosen and where it ends, apart from the model's own end."""

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_whole("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        check_number("temperature", self.temperature, 0, 1000)
        check_number("top_p", self.top_p, 0, 1, above_low=True)
        check_whole("seed", self.seed, 0, MAX_SEED)
        if not all(isinstance(s, str) and s for s in self.stop):
            raise OptionError(f"stop must be strings that are not empty, got {self.stop!r}")


class _LanguageModel:
    """The language model as ``generate_step`` calls it, with float32 logits."""

    def __init__(self, model: JanusModel):
        self.model = model
        self.layers = model.language_model.layers

    def make_cache(self) -> Cache:
        return self.model.make_cache()

    def __call__(
        self, inputs: mx.array, cache: Cache | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        embeddings = self.model.embed_text(inputs) if input_embeddings is None else input_embeddings
        return self.model.text_logits(self.model.hidden_states(embeddings, cache))


def answer_tokens(
    model: JanusModel, embeddings: mx.array, options: TextOptions, cache: Cache | None = None, **loop: Any
) -> Iterator[int]:
    """Token ids of an answer, stop tokens included, at most ``options.max_tokens``; closing stops within a step.

    Args:
        model: the weights.
        embeddings: (L, hidden), the prompt with its pictures in place.
        options: choice and length.
        cache: what the language model has read before, if anything; it grows.
        loop: further arguments of mlx-lm's ``generate_step``.
    """
    key = mx.random.key(options.seed)

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, drawn = mx.random.split(key)
        return choose(logprobs, drawn[None], options.temperature, options.top_p)

    steps = generate_step(
        mx.array([], dtype=mx.int32),
        _LanguageModel(model),
        max_tokens=options.max_tokens,
        sampler=sampler,
        prompt_cache=cache,
        input_embeddings=embeddings,
        **loop,
    )
    for token, _ in steps:
        yield int(token)


class StopStrings:
    """Cuts a stream of text at the first of some strings, holding back what may yet become one."""

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string was met."""
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = self._unsafe()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def finish(self) -> str:
        """What was held back, once nothing follows."""
        shown, self._held = self._held, ""
        return shown

    def _unsafe(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0
