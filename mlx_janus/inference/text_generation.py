"""From the ids of a prompt and the features of its pictures to an answer in pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..decode.sampling import pick_seed
from ..decode.text import StopStrings, TextOptions, answer_tokens, read_in_pieces
from ..models.backbone import Cache
from .results import TextChunk, TextResult

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

READING = TextChunk("")
"""Among chunks for every token: a piece of the prompt was read."""
_PIECE = 256  # positions of a prompt between two of these


def text_options(
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] | str = (),
    lookup: int = 0,
) -> TextOptions:
    """The options of ``generate_text``, checked; without a seed with a random one.

    Raises:
        OptionError: a number out of its range.
    """
    return TextOptions(max_tokens, temperature, top_p, pick_seed(seed), as_strings(stop), lookup)


def as_strings(text: Sequence[str] | str) -> tuple[str, ...]:
    """Strings, of one where a single string was given."""
    return (text,) if isinstance(text, str) else tuple(text)


def embed_prompt(janus: JanusPipeline, ids: Sequence[int], features: Sequence[mx.array]) -> mx.array:
    """(L, hidden): ids embedded, with (positions, hidden) features, one after the other, where pictures stand."""
    embeddings = janus.model.embed_text(mx.array(list(ids), mx.int32)[None])[0]
    if features:
        places = np.flatnonzero(np.array(ids) == janus.prompts.special.image)
        embeddings[mx.array(places)] = mx.concatenate(list(features)).astype(embeddings.dtype)
    return embeddings


def stream_answer(
    janus: JanusPipeline,
    ids: Sequence[int],
    encode: Callable[[], tuple[list[mx.array], float]],
    options: TextOptions,
    cache: Cache | None = None,
    read: int = 0,
    *,
    every_token: bool = False,
) -> Iterator[TextChunk]:
    """Answer, in pieces of whole characters; the last one carries the result. Closing stops within a step.

    Args:
        janus: the model.
        ids: the prompt, shorter than the model's context; the answer ends where that does.
        encode: gives (positions, hidden) arrays, together what stands at the pictures' positions among ``ids[read:]``,
            and the seconds spent on them.
        options: choice and length.
        cache: holds the first ``read`` ids, and grows.
        read: how many ids the cache holds.
        every_token: give a chunk for every token, without text where it completes none, and ``READING`` for every
            piece of a long prompt, so that whoever takes turns with others can.
    """
    with janus.turn:
        yield from _stream(janus, ids, encode, options, cache, read, every_token)


def _stream(
    janus: JanusPipeline,
    ids: Sequence[int],
    encode: Callable[[], tuple[list[mx.array], float]],
    options: TextOptions,
    cache: Cache | None,
    read: int,
    every_token: bool,
) -> Iterator[TextChunk]:
    model, prompts = janus.model, janus.prompts
    mx.reset_peak_memory()
    features, spent = encode()
    janus.prepare("answer")
    started = time.perf_counter() - spent
    embeddings = embed_prompt(janus, ids[read:], features)
    room = model.config.language.max_position_embeddings - len(ids)
    options = replace(options, max_tokens=min(options.max_tokens, room))
    if every_token:
        cache = cache or model.make_cache()
        for left in read_in_pieces(model, embeddings, cache, _PIECE):
            embeddings = left
            yield READING
    stream = answer_tokens(model, embeddings, options, cache, ids=ids)
    del embeddings, features
    words, stops = prompts.detokenizer(), StopStrings(options.stop)
    tokens: list[int] = []
    first, reason, said, cut = 0.0, "length", "", False
    try:
        for token in stream:
            first = first or time.perf_counter()
            if token == prompts.special.eos:
                reason = "stop"
                break
            tokens.append(token)
            piece, cut = stops.add(words.add(token))
            piece = piece if said else piece.lstrip()
            said += piece
            if piece or every_token:
                yield TextChunk(piece)
            if cut:
                reason = "stop"
                break
    finally:
        stream.close()  # type: ignore[attr-defined]
    tail = "" if cut else _tail(words.finish(), stops)
    tail = tail if said else tail.lstrip()
    spent = time.perf_counter() - first
    yield TextChunk(
        tail,
        TextResult(
            text=said + tail,
            tokens=tuple(tokens),
            finish_reason=reason,
            prompt_tokens=len(ids),
            prompt_tps=(len(ids) - read) / (first - started),
            generation_tps=max(len(tokens) - 1, 0) / spent if spent > 0 else 0.0,
            peak_memory=mx.get_peak_memory(),
            cached_tokens=read,
            first_token_seconds=first - started,
        ),
    )


def _tail(rest: str, stops: StopStrings) -> str:
    text, cut = stops.add(rest)
    return text if cut else text + stops.finish()
