"""Batches of the last stages: conversations about images, and captions with their images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from ...processing.prompts import Prompts, Turn
from ...worlds import language, shapes
from .auxiliary_heads import placing_targets, tracking_targets

IMAGE_AT = 5  # position of the first placeholder, after bos, <|User|>, ":", " ", begin-of-image
_CAPTION = 24  # positions of a caption with its template; the few longer ones are worded again
_CONVERSATION = 160  # positions of a conversation, at most
_ANSWERS = 80  # positions of a conversation's answers, at most
_TEMPLATE = 8  # positions of a question and its answer in addition to their words


class ConversationBatch(TypedDict):
    """Conversations about one image each, padded to one length."""

    pixels: np.ndarray  # (B, SIDE, SIDE, 3) in [-1, 1]
    ids: np.ndarray  # (B, L); the image's placeholders begin at IMAGE_AT in every row
    positions: np.ndarray  # (B, M) positions that predict a token of the assistant
    targets: np.ndarray  # (B, M) that token's id
    weights: np.ndarray  # (B, M) 1.0, or 0.0 after a row's last answer
    places: np.ndarray  # (B, L, 3) x, y and 1 where a thing is named, else zeros


class CaptionBatch(TypedDict):
    """Captions and their images."""

    pixels: np.ndarray  # (B, SIDE, SIDE, 3) in [-1, 1]
    ids: np.ndarray  # (B, L), padded at the end
    starts: np.ndarray  # (B,) position of begin-of-image
    owners: np.ndarray  # (B, n, 2) shape and colour label at each of the n image tokens
    begun: np.ndarray  # (B, n, COUNT_BITS) counts of the things that begin before each token
    ahead: np.ndarray  # (B, n, COUNT_BITS) counts of the other things


def conversation_batch(
    prompts: Prompts,
    random: np.random.Generator,
    size: int,
    shares: Mapping[str, float] = language.SHARES,
) -> ConversationBatch:
    """Make conversations about one image each, filled with questions.

    Args:
        prompts: the model's tokenizer and template.
        random: source of all randomness.
        size: number of conversations.
        shares: share of each kind of question.
    """
    special = prompts.special
    kinds = random.choice(shapes.BUSY, size)
    scenes = [shapes.sample_scene(random, kind) for kind in kinds]
    ids = np.full((size, _CONVERSATION), special.pad, np.int32)
    positions = np.zeros((size, _ANSWERS), np.int32)
    targets = np.zeros((size, _ANSWERS), np.int32)
    weights = np.zeros((size, _ANSWERS), np.float32)
    places = np.zeros((size, _CONVERSATION, 3), np.float32)
    words = _word_ids(prompts)
    for row, scene in enumerate(scenes):
        conversation, is_answer = _conversation(prompts, scene, random, shares)
        length = len(conversation)
        ids[row, :length] = conversation
        answers = np.flatnonzero(is_answer)[:_ANSWERS]
        number = len(answers)
        positions[row, :number] = answers - 1  # a token is predicted one position before its own
        targets[row, :number] = ids[row, answers]
        weights[row, :number] = 1.0
        places[row] = placing_targets(ids[row], scene, words)
    before_images = ids[:, IMAGE_AT - 1]  # the losses put every row's image at IMAGE_AT
    assert (before_images == special.image_start).all()
    return {
        "pixels": _pixels(scenes),
        "ids": ids,
        "positions": positions,
        "targets": targets,
        "weights": weights,
        "places": places,
    }


def _word_ids(prompts: Prompts) -> dict[str, int]:
    """Return the first token id of each shape's and each colour's word."""
    words = {}
    for name in (*shapes.SHAPES, *shapes.COLOURS):
        tokens = prompts.encode(f" {name}")
        words[name] = tokens[0]
    return words


def _conversation(
    prompts: Prompts,
    scene: shapes.Scene,
    random: np.random.Generator,
    shares: Mapping[str, float],
) -> tuple[list[int], list[bool]]:
    """Make a conversation: its ids, and for each id whether it belongs to an answer or its eos."""
    ids: list[int] = []
    is_answer: list[bool] = []
    turns: list[Turn] = []
    for question in _questions(prompts, scene, random, shares):
        # Each prompt repeats the conversation so far, so only its new ids extend ``is_answer``.
        images = 0 if turns else 1
        turns.append(Turn("user", question.text, images))
        prompt = prompts.answering(turns)
        answer = prompts.encode(f" {question.answer}")
        answer = [*answer, prompts.special.eos]
        added = len(prompt) - len(ids)
        is_answer += [False] * added
        is_answer += [True] * len(answer)
        ids = prompt + answer
        turns.append(Turn("assistant", question.answer))
    return ids, is_answer


def _questions(
    prompts: Prompts,
    scene: shapes.Scene,
    random: np.random.Generator,
    shares: Mapping[str, float],
) -> list[language.Question]:
    """Ask questions about a scene until the next one would exceed ``_CONVERSATION`` positions."""
    first = language.question(scene, random, shares=shares)
    asked = [first]
    used = prompts.image_tokens + _TEMPLATE
    used += _length(prompts, first)
    while True:
        question = language.question(scene, random, shares=shares)
        used += _length(prompts, question)
        if used > _CONVERSATION:
            return asked
        asked.append(question)


def _length(prompts: Prompts, question: language.Question) -> int:
    """Return an upper bound on the positions of a question with its answer."""
    text = prompts.encode(question.text)
    answer = prompts.encode(f" {question.answer}")
    return len(text) + len(answer) + _TEMPLATE


def caption_batch(
    prompts: Prompts,
    random: np.random.Generator,
    size: int,
    dropped: float,
    kinds: Mapping[shapes.Kind, float] = shapes.KINDS,
) -> CaptionBatch:
    """Make captions with their images.

    Args:
        prompts: the model's tokenizer and template.
        random: source of all randomness.
        size: number of captions.
        dropped: share of captions replaced by pads, as guidance needs a model that draws without a
            caption.
        kinds: share of each kind of scene.
    """
    scenes = [shapes.sample_scene(random, kinds=kinds) for _ in range(size)]
    rows = []
    for scene in scenes:
        row = _caption(prompts, scene, random)
        if random.random() < dropped:
            row = prompts.unconditional(row)
        rows.append(row)
    ids = np.full((size, _CAPTION), prompts.special.pad, np.int32)
    starts = np.zeros(size, np.int32)
    for index, row in enumerate(rows):
        length = len(row)
        ids[index, :length] = row
        starts[index] = length - 1  # a caption's last token is begin-of-image
    grid = math.isqrt(prompts.image_tokens)
    tracking = [tracking_targets(scene, grid) for scene in scenes]
    owners, begun, ahead = zip(*tracking, strict=True)
    return {
        "pixels": _pixels(scenes),
        "ids": ids,
        "starts": starts,
        "owners": np.stack(owners),
        "begun": np.stack(begun),
        "ahead": np.stack(ahead),
    }


def _caption(prompts: Prompts, scene: shapes.Scene, random: np.random.Generator) -> list[int]:
    """Word a caption, and word it again while it is too long; return its ids."""
    while True:
        caption = language.caption(scene, random)
        row = prompts.drawing(caption)
        if len(row) <= _CAPTION:
            return row


def _pixels(scenes: Sequence[shapes.Scene]) -> np.ndarray:
    """Render scenes: (B, SIDE, SIDE, 3) in [-1, 1]."""
    images = [shapes.pixels(scene) for scene in scenes]
    return np.stack(images)
