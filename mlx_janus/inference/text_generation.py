"""Generate an answer from a prompt's ids and its images' features, as events or as text."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import mlx.core as mx
import numpy as np

from ..decode.answer_batch import AnswerBatch, BatchAnswer
from ..decode.grammar import schema_grammar
from ..decode.logprobs import AnswerToken
from ..decode.prefill import prefill
from ..decode.sampling import pick_seed
from ..decode.text import PREFILL_STEP, StopStrings, TextOptions, answer_tokens
from ..decode.text_options import SamplingArguments
from ..errors import OptionError
from ..limits import check_text
from ..models.backbone import Cache
from ..processing.prompts import Prompts
from .loaded import LoadedModel, Stopwatch
from .model_thread import ThreadStream
from .results import TextChunk, TextResult, TokenLogprob


@dataclass(frozen=True)
class PromptRead:
    """The progress of reading a long prompt into the KV cache."""

    done: int  # positions in the cache, those read earlier included
    total: int  # positions of the entire prompt


@dataclass(frozen=True)
class Token:
    """A token of the answer, and the characters that it completes, if any."""

    id: int
    text: str
    logprob: TokenLogprob | None = None  # None: not asked for

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """The log-probability as a tuple; an empty one if it was not asked for."""
        return () if self.logprob is None else (self.logprob,)


@dataclass(frozen=True)
class Finished:
    """The end of an answer: its last characters, held back until now, and the result."""

    text: str
    result: TextResult


TextEvent = PromptRead | Token | Finished
ImageFeatures = Callable[[Stopwatch], list[mx.array]]
"""Encodes images, timed by the stopwatch; returns (positions, hidden) for each, in order."""


TEXT_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "lookup",
    *SamplingArguments.__annotations__,
)
"""Names of the options of ``generate_text`` about the answer."""


def text_options(
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] | str = (),
    lookup: int = 0,
    **sampling: Unpack[SamplingArguments],
) -> TextOptions:
    """Check the options of ``generate_text``; without a seed, pick a random one.

    Raises:
        OptionError: an option has a wrong type, a number is out of range, a stop string is empty,
            ``top_logprobs`` is given without ``logprobs``, or ``lookup`` with ``schema``.
    """
    choice: dict[str, Any] = dict(sampling)
    if choice.get("logit_bias") is None:  # missing, or None for the default
        choice.pop("logit_bias", None)
    schema = choice.pop("schema", None)
    if schema is not None:
        choice["grammar"] = schema_grammar(schema)
    return TextOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=pick_seed(seed),
        stop=as_strings("stop", stop),
        lookup=lookup,
        **choice,
    )


def as_strings(name: str, value: Sequence[str] | str) -> tuple[str, ...]:
    """Return one string or several as a tuple.

    Args:
        name: the argument's name, for the error message.
        value: a string or several.

    Raises:
        OptionError: the value is neither a string nor an iterable of strings.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise OptionError(f"{name} must be text or several texts, got {type(value).__name__}")
    return tuple(check_text(name, text) for text in value)


def embed_prompt(janus: LoadedModel, ids: Sequence[int], features: Sequence[mx.array]) -> mx.array:
    """Embed a prompt, with the features of its images in place of the placeholders.

    Args:
        janus: the model.
        ids: the prompt, with a placeholder id at each position of an image.
        features: (positions, hidden) of each image, in order.

    Returns:
        The embeddings, (L, hidden).
    """
    embeddings = janus.model.embed_text(mx.array(list(ids), mx.int32)[None])[0]
    if features:
        positions = np.flatnonzero(np.array(ids) == janus.prompts.special.image)
        image_embeddings = mx.concatenate(list(features))
        embeddings[mx.array(positions)] = image_embeddings.astype(embeddings.dtype)
    return embeddings


def answer_chunks(events: Generator[TextEvent, None, None]) -> Generator[TextChunk, None, None]:
    """Turn the events of an answer into pieces of its text; the last piece has the result.

    ``PromptRead`` events and tokens without text and log-probability yield nothing. Closing this
    generator closes ``events``.
    """
    try:
        for event in events:
            if isinstance(event, Finished):
                yield TextChunk(event.text, event.result)
            elif isinstance(event, Token) and (event.text or event.logprob):
                yield TextChunk(event.text, logprobs=event.logprobs)
    finally:
        events.close()


def answer_pieces(
    events: Generator[TextEvent, None, None],
) -> Generator[str, None, tuple[int, ...]]:
    """Yield the text of an answer's tokens, and return the tokens.

    Closing this generator closes ``events``.
    """
    tokens: tuple[int, ...] = ()
    try:
        for event in events:
            if isinstance(event, Token):
                yield event.text
            elif isinstance(event, Finished):
                tokens = event.result.tokens
    finally:
        events.close()
    return tokens


def last_result(chunks: ThreadStream[TextChunk]) -> TextResult:
    """Read the stream of an answer to its end, and return the result."""
    with contextlib.closing(chunks):
        for chunk in chunks:
            if chunk.result is not None:
                return chunk.result
    raise AssertionError("a stream ends with its result")


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer.

    Args:
        ids: all ids, fewer than the model's context; the answer ends at the end of the context.
        features: encodes the images whose positions are among ``ids[read:]``.
        cache: holds the first ``read`` ids, and grows; None: a new cache.
        read: the number of ids in the cache.
        step: positions read between two events.
        continues: whether the prompt ends with the beginning of the answer. The answer then keeps
            its leading white space.
        reset_peak: whether MLX's peak memory is counted from the start of this answer.
    """

    ids: Sequence[int]
    features: ImageFeatures
    cache: Cache | None = None
    read: int = 0
    step: int = PREFILL_STEP
    continues: bool = False
    reset_peak: bool = True


def answer_events(
    janus: LoadedModel,
    prompt: Prompt,
    options: TextOptions,
    batch: AnswerBatch | None = None,
) -> Generator[TextEvent, None, None]:
    """Answer a prompt. Closing the generator ends the answer within a step.

    Args:
        janus: the model.
        prompt: the prompt.
        options: sampling and length.
        batch: generates the answer together with others, unless it has ``lookup``. The events up
            to the last ``PromptRead`` add the answer to the batch; then each step of the batch
            makes one more ``Token`` ready. None: the answer is generated alone.

    Yields:
        ``PromptRead`` after each part of ``prompt.step`` positions, except after the last part,
        and in a batch after the last part, too; ``Token`` for each token of the answer, except for
        an end token; then ``Finished``.
    """
    if prompt.reset_peak:
        mx.reset_peak_memory()
    stopwatch = Stopwatch()
    features = prompt.features(stopwatch)
    janus.load_weights_for("answer")
    # The time to the first token is the time from here on plus the time to encode the images. So it
    # leaves out the time to load the weights above.
    started = time.perf_counter() - stopwatch.seconds
    cache = prompt.cache or janus.model.make_cache()
    embeddings = embed_prompt(janus, prompt.ids[prompt.read :], features)
    del features  # otherwise they would be held until the end of the answer
    done = 0  # positions of ``embeddings`` that ``prefill`` reads; ``_start_answer`` reads the rest
    for done, _ in prefill(janus.model, embeddings[None], cache, prompt.step, unread=prompt.step):
        yield PromptRead(prompt.read + done, len(prompt.ids))
        janus.load_weights_for("answer")  # another task may have freed them
    # The answer ends at the end of the context.
    room = janus.config.language.max_position_embeddings - len(prompt.ids)
    options = replace(options, max_tokens=min(options.max_tokens, room))
    answer = _Answer(janus.prompts, options, prompt.continues)
    tokens = _start_answer(janus, embeddings[done:], options, cache, prompt.ids, batch)
    del embeddings  # otherwise they would be held until the end of the answer
    first_at = 0.0  # time of the first token; 0: none yet
    try:
        if isinstance(tokens, BatchAnswer):
            yield PromptRead(len(prompt.ids), len(prompt.ids))
        for token in tokens:
            first_at = first_at or time.perf_counter()
            event = answer.add(token)
            if event is not None:
                yield event
            if answer.ended:
                break
            janus.load_weights_for("answer")  # another task may have freed them
    finally:
        tokens.close()
    text = answer.finish()
    yield Finished(text, answer.result(prompt, first_at - started, time.perf_counter() - first_at))


def _start_answer(
    janus: LoadedModel,
    embeddings: mx.array,
    options: TextOptions,
    cache: Cache,
    ids: Sequence[int],
    batch: AnswerBatch | None,
) -> Generator[AnswerToken, None, None] | BatchAnswer:
    """Return an iterator over the tokens of an answer; in a batch, read its prompt first.

    Args:
        janus: the model.
        embeddings: (L, hidden), the part of the prompt that ``cache`` does not hold.
        options: sampling and length.
        cache: a KV cache that holds the beginning of the prompt, and grows.
        ids: the prompt's ids.
        batch: as for ``answer_events``.
    """
    constraint = None
    if options.grammar is not None:
        constraint = janus.grammars.constraint(options.grammar, options.max_tokens)
    if batch is None or options.lookup:
        return answer_tokens(
            janus.model, embeddings, options, cache, ids=ids, constraint=constraint
        )
    return batch.add(embeddings, options, cache, ids=ids, constraint=constraint)


class _Answer:
    """The text of an answer so far.

    The text has complete characters only, and ends before a stop string. It has no leading white
    space, unless it continues an answer.
    """

    def __init__(self, prompts: Prompts, options: TextOptions, continues: bool):
        self.ended = False  # whether an end token or a stop string ended the answer
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []  # one for each token, if asked for
        self._text = ""
        self._cut_by_stop = False  # whether a stop string ended the answer
        self._prompts = prompts
        self._detokenizer = prompts.detokenizer()
        self._end_ids = prompts.end_ids
        self._wants_logprobs = options.logprobs
        self._continues = continues
        # Filters the text.
        self._stop_strings = StopStrings(options.stop)

    def add(self, token: AnswerToken) -> Token | None:
        """Add a token; return it with the characters that are safe to show now.

        An end token or a stop string sets ``ended``. For an end token the result is None.
        """
        if token.id in self._end_ids:
            self.ended = True
            return None
        self._tokens.append(token.id)
        completed = self._detokenizer.add(token.id)
        text, self._cut_by_stop = self._stop_strings.add(completed)
        self.ended = self._cut_by_stop
        shown = self._append(text)
        if token.logprob is None:
            return Token(token.id, shown)
        top = tuple(self._spell(*likely) for likely in token.top)
        logprob = self._spell(token.id, token.logprob, top)
        self._logprobs.append(logprob)
        return Token(token.id, shown, logprob)

    def _spell(
        self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        """Return a token's log-probability with its text and bytes."""
        text, utf8 = self._prompts.spelling(token)
        return TokenLogprob(token, text, utf8, logprob, top)

    def finish(self) -> str:
        """End the answer, and return its last characters, which ``add`` has held back.

        ``add`` holds back incomplete characters, and text that may begin a stop string.
        """
        if self._cut_by_stop:  # anything held back is after the stop string
            return ""
        text, cut_by_stop = self._stop_strings.add(self._detokenizer.finish())
        if cut_by_stop:
            self.ended = True
        else:
            text += self._stop_strings.finish()
        return self._append(text)

    def result(
        self, prompt: Prompt, prompt_seconds: float, generation_seconds: float
    ) -> TextResult:
        """Return the finished answer with its statistics.

        Args:
            prompt: the prompt.
            prompt_seconds: time to the first token.
            generation_seconds: time after the first token.
        """
        later_tokens = max(len(self._tokens) - 1, 0)  # tokens after the first
        return TextResult(
            text=self._text,
            tokens=tuple(self._tokens),
            finish_reason="stop" if self.ended else "length",
            prompt_tokens=len(prompt.ids),
            prompt_tps=(len(prompt.ids) - prompt.read) / prompt_seconds,
            generation_tps=later_tokens / generation_seconds if generation_seconds > 0 else 0.0,
            peak_memory=mx.get_peak_memory(),
            cached_tokens=prompt.read,
            first_token_seconds=prompt_seconds,
            logprobs=tuple(self._logprobs) if self._wants_logprobs else None,
            stop=self._stop_strings.found,
        )

    def _append(self, text: str) -> str:
        """Append text to the answer, and return it.

        White space at its start is dropped, unless the prompt ends with the beginning of an answer.
        """
        at_start = not self._text and not self._continues
        if at_start:
            text = text.lstrip()
        self._text += text
        return text
