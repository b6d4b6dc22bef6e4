"""Batches of the last training stages: conversations about images, and captions with images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from ...processing.prompts import Prompts, Turn
from ...worlds import language, question_forms, shapes
from .auxiliary_heads import placing_targets, tracking_targets

_CAPTION_LENGTH = 24  # tokens of a caption with its template; the few longer ones are worded again
_CONVERSATION_LENGTH = 192  # tokens of a conversation, at most
_ANSWERS_LENGTH = 80  # tokens of all answers in a conversation, at most
_TEMPLATE_LENGTH = 8  # tokens that the template adds to a question and its answer, at most
_SYSTEM_SHARE = 0.15  # share of conversations with a system prompt


class ConversationBatch(TypedDict):
    """Conversations, each about its own image, padded to one length."""

    pixels: np.ndarray  # (B, SIDE, SIDE, 3) in [-1, 1]
    ids: np.ndarray  # (B, L)
    images: np.ndarray  # (B,) position of the first placeholder of the image
    positions: np.ndarray  # (B, M) positions from which a token of an answer is predicted
    targets: np.ndarray  # (B, M) ids of the predicted tokens
    weights: np.ndarray  # (B, M) 1.0 for a token of an answer, 0.0 for the padding after them
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
    """Make conversations, each about its own image and filled with questions.

    Args:
        prompts: the model's tokenizer and template.
        random: source of all randomness.
        size: number of conversations.
        shares: share of each question topic.
    """
    special = prompts.special
    kinds = random.choice(shapes.BUSY, size)
    scenes = [shapes.sample_scene(random, kind) for kind in kinds]
    ids = np.full((size, _CONVERSATION_LENGTH), special.pad, np.int32)
    images = np.zeros(size, np.int32)
    positions = np.zeros((size, _ANSWERS_LENGTH), np.int32)
    targets = np.zeros((size, _ANSWERS_LENGTH), np.int32)
    weights = np.zeros((size, _ANSWERS_LENGTH), np.float32)
    places = np.zeros((size, _CONVERSATION_LENGTH, 3), np.float32)
    word_ids = _word_ids(prompts)
    for row, scene in enumerate(scenes):
        conversation, is_answer = _conversation(prompts, scene, random, shares)
        length = len(conversation)
        ids[row, :length] = conversation
        images[row] = conversation.index(special.image_start) + 1
        answered = np.flatnonzero(is_answer)[:_ANSWERS_LENGTH]  # positions of the answers' tokens
        number = len(answered)
        positions[row, :number] = answered - 1  # a token is predicted one position before its own
        targets[row, :number] = ids[row, answered]
        weights[row, :number] = 1.0
        places[row] = placing_targets(ids[row], scene, word_ids)
    return {
        "pixels": _pixels(scenes),
        "ids": ids,
        "images": images,
        "positions": positions,
        "targets": targets,
        "weights": weights,
        "places": places,
    }


def _word_ids(prompts: Prompts) -> dict[str, int]:
    """Return the first token id of each shape's and each colour's word, by word."""
    word_ids = {}
    for word in (*shapes.SHAPES, *shapes.COLOURS):
        ids = prompts.encode(f" {word}")
        word_ids[word] = ids[0]
    return word_ids


def _conversation(
    prompts: Prompts,
    scene: shapes.Scene,
    random: np.random.Generator,
    shares: Mapping[str, float],
) -> tuple[list[int], list[bool]]:
    """Make a conversation about a scene.

    Returns:
        The conversation's token ids, and for each id whether it belongs to an answer. An answer
        ends with eos.
    """
    ids: list[int] = []
    is_answer: list[bool] = []
    turns: list[Turn] = []
    system = ""
    if random.random() < _SYSTEM_SHARE:
        system = language.choose(random, question_forms.SYSTEM_PROMPTS)
    room = _CONVERSATION_LENGTH - len(prompts.encode(system))
    for question in _questions(prompts, scene, random, shares, room):
        images = 0 if turns else 1  # only the first question shows the image
        turns.append(Turn("user", question.text, images))
        prompt = prompts.answering(turns, system)  # begins with ``ids``, the conversation so far
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
    room: int,
) -> list[language.Question]:
    """Ask questions about a scene, at least one, in random forms until ``room`` tokens are full."""
    asked: list[language.Question] = []
    length = prompts.image_tokens + _TEMPLATE_LENGTH
    while True:
        plain = language.question(scene, random, shares=shares)
        question = question_forms.sample_form(plain, random)
        length += _length_bound(prompts, question)
        if asked and length > room:
            return asked
        asked.append(question)


def _length_bound(prompts: Prompts, question: language.Question) -> int:
    """Return an upper bound on the number of tokens of a question with its answer."""
    text = prompts.encode(question.text)
    answer = prompts.encode(f" {question.answer}")
    return len(text) + len(answer) + _TEMPLATE_LENGTH


def caption_batch(
    prompts: Prompts,
    random: np.random.Generator,
    size: int,
    dropped_share: float,
    kinds: Mapping[shapes.Kind, float] = shapes.KINDS,
) -> CaptionBatch:
    """Make captions with their images.

    Args:
        prompts: the model's tokenizer and template.
        random: source of all randomness.
        size: number of captions.
        dropped_share: share of captions that pads replace, because guidance needs a model that
            also draws without a caption.
        kinds: share of each kind of scene.
    """
    scenes = [shapes.sample_scene(random, kinds=kinds) for _ in range(size)]
    rows = []
    for scene in scenes:
        row = _caption_ids(prompts, scene, random)
        if random.random() < dropped_share:
            row = prompts.unconditional(row)
        rows.append(row)
    ids = np.full((size, _CAPTION_LENGTH), prompts.special.pad, np.int32)
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


def _caption_ids(prompts: Prompts, scene: shapes.Scene, random: np.random.Generator) -> list[int]:
    """Return the token ids of a caption in its template; a caption that is too long is replaced."""
    while True:
        caption = language.caption(scene, random)
        ids = prompts.drawing(caption)
        if len(ids) <= _CAPTION_LENGTH:
            return ids


def _pixels(scenes: Sequence[shapes.Scene]) -> np.ndarray:
    """Render scenes as one array: (B, SIDE, SIDE, 3) in [-1, 1]."""
    images = [shapes.pixels(scene) for scene in scenes]
    return np.stack(images)
