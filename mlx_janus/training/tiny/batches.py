"""Batches of the joint stage: conversations about pictures, and captions with the image tokens of their pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...processing.prompts import Prompts, Turn
from ...worlds import language, shapes
from .auxiliary_heads import name_places, track

PICTURE_AT = 5  # bos, <|User|>, ":", " ", begin-of-image
_CAPTION = 24  # positions of a caption with its template; one in a few hundred is longer, and is worded anew
_LENGTH = 160  # positions of a conversation
_SAID = 80  # positions of its answers
_MARGIN = 8  # positions of a turn besides its question and answer


@dataclass(frozen=True)
class AnsweringBatch:
    """Conversations, one picture each, padded to one length."""

    pixels: np.ndarray  # (B, SIDE, SIDE, 3)
    ids: np.ndarray  # (B, L); the placeholders of the picture begin at PICTURE_AT in every row
    asked: np.ndarray  # (B, M) positions whose next id the assistant says
    said: np.ndarray  # (B, M) that next id
    counts: np.ndarray  # (B, M) 1.0, or 0.0 where the row has no more answers
    places: np.ndarray  # (B, L, 3), what ``tracking.name_places`` gives


@dataclass(frozen=True)
class DrawingBatch:
    """Captions, each followed by room for its picture's tokens."""

    pixels: np.ndarray  # (B, SIDE, SIDE, 3)
    ids: np.ndarray  # (B, L)
    starts: np.ndarray  # (B,) the position of begin-of-image
    owners: np.ndarray  # (B, n, 2), and below (B, n, MARKS): what ``tracking`` asks of every token
    begun: np.ndarray
    ahead: np.ndarray


def answering_batch(
    prompts: Prompts, random: np.random.Generator, size: int, shares: Mapping[str, float] = language.SHARES
) -> AnsweringBatch:
    """``size`` conversations: as many questions about one picture, in the given shares, as fit."""
    scenes = [shapes.sample_scene(random, kind) for kind in random.choice(shapes.BUSY, size)]
    ids = np.full((size, _LENGTH), prompts.special.pad, np.int32)
    asked, said = np.zeros((2, size, _SAID), np.int32)
    counts = np.zeros((size, _SAID), np.float32)
    for row, scene in enumerate(scenes):
        conversation, answers = _conversation(prompts, scene, random, shares)
        ids[row, : len(conversation)] = conversation
        places = np.flatnonzero(answers)[:_SAID]
        asked[row, : len(places)], said[row, : len(places)] = places - 1, ids[row, places]
        counts[row, : len(places)] = 1.0
    assert (ids[:, PICTURE_AT - 1] == prompts.special.image_start).all()
    words = {word: prompts.encode(f" {word}")[0] for word in (*shapes.SHAPES, *shapes.COLOURS)}
    places = np.stack([name_places(row, scene, words) for row, scene in zip(ids, scenes, strict=True)])
    return AnsweringBatch(_pixels(scenes), ids, asked, said, counts, places)


def _conversation(
    prompts: Prompts, scene: shapes.Scene, random: np.random.Generator, shares: Mapping[str, float]
) -> tuple[list[int], list[bool]]:
    """Ids, and which of them the assistant says, the end of an answer included."""
    asked = [language.question(scene, random, shares=shares)]
    used = prompts.image_tokens + _MARGIN + _length(prompts, asked[0])
    while True:
        more = language.question(scene, random, shares=shares)
        used += _length(prompts, more)
        if used > _LENGTH:
            break
        asked.append(more)
    ids: list[int] = []
    answers: list[bool] = []
    turns: list[Turn] = []
    for question in asked:
        turns.append(Turn("user", question.text, 0 if turns else 1))
        prompt = prompts.answering(turns)
        answer = [*prompts.encode(f" {question.answer}"), prompts.special.eos]
        answers += [False] * (len(prompt) - len(ids)) + [True] * len(answer)
        ids = prompt + answer
        turns.append(Turn("assistant", question.answer))
    return ids, answers


def _length(prompts: Prompts, question: language.Question) -> int:
    return len(prompts.encode(question.text)) + len(prompts.encode(f" {question.answer}")) + _MARGIN


def drawing_batch(
    prompts: Prompts,
    random: np.random.Generator,
    size: int,
    dropped: float,
    kinds: Mapping[shapes.Kind, float] = shapes.KINDS,
) -> DrawingBatch:
    """``size`` captions with their pictures, of scenes in given shares; of some the caption is turned into pads."""
    scenes = [shapes.sample_scene(random, kinds=kinds) for _ in range(size)]
    rows = []
    for scene in scenes:
        row = prompts.drawing(language.caption(scene, random))
        while len(row) > _CAPTION:
            row = prompts.drawing(language.caption(scene, random))
        rows.append(prompts.unconditional(row) if random.random() < dropped else row)
    ids = np.full((size, _CAPTION), prompts.special.pad, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    grid = math.isqrt(prompts.image_tokens)
    tracked = (np.stack(part) for part in zip(*(track(scene, grid) for scene in scenes), strict=True))
    return DrawingBatch(_pixels(scenes), ids, np.array([len(row) - 1 for row in rows], np.int32), *tracked)


def _pixels(scenes: list[shapes.Scene]) -> np.ndarray:
    return np.stack([shapes.pixels(scene) for scene in scenes])
