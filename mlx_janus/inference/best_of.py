"""Best of N: draw several images of each prompt, and keep those that the model finds likeliest.

The understanding half of the model reads each image. The score is the likelihood of the prompt as
its answer to a question about the image, so no other model is needed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import mlx.core as mx
from PIL import Image

from ..errors import OptionError
from ..limits import MAX_BEST_OF, check_int
from ..processing.images import preprocess
from ..processing.prompts import Turn
from .loaded import LoadedModel, Stopwatch
from .pathway import ImageJob, InputImages
from .results import GeneratedImage, ImageStep
from .scoring import score_answers

_ENCODED_TOGETHER = 16  # images to encode before they are scored, in low-memory mode


@dataclass(frozen=True)
class Wording:
    """A question by which an image is scored; the prompt is inserted at ``{prompt}``.

    An open question does not name the prompt. Its score is the log-probability of the prompt as the
    answer. A yes-no question names the prompt. Its score is log P(yes) - log P(no), where each
    probability is the sum over the spellings of the word.
    """

    question: str
    yes_no: bool = False


WORDINGS = {
    "see": Wording("What do you see?"),
    "what": Wording("What is in the picture?"),
    "describe": Wording("Describe the picture."),
    "show": Wording("Does the image show {prompt}?", yes_no=True),
    "there": Wording("Is there {prompt}?", yes_no=True),
    "match": Wording('Does this image match the prompt "{prompt}"?', yes_no=True),
}
"""Wordings by name, as ``benchmarks/best_of.py`` compares them."""
DEFAULT_WORDING = WORDINGS["see"]
"""The wording of ``generate_images``."""


@dataclass(frozen=True)
class Selection:
    """A choice among the images of each prompt."""

    drawn: int  # images of each prompt, the candidates
    kept: int  # the best of them
    wording: Wording = DEFAULT_WORDING


def check_selection(
    janus: LoadedModel,
    prompts: Sequence[str],
    n: int,
    best_of: int,
    inputs: InputImages | None = None,
) -> Selection:
    """Check a request for the best ``n`` of ``best_of`` images of each prompt.

    Raises:
        OptionError: ``best_of`` is no integer from 1 to ``MAX_BEST_OF``, ``n`` is no integer from 1
            to ``best_of``, or there are images to change.
        PromptError: a question about a prompt does not fit into the context.
    """
    drawn = check_int("best_of", best_of, 1, MAX_BEST_OF)
    kept = check_int("n", n, 1, drawn)
    if inputs is not None:
        raise OptionError("best_of compares images with their prompt: leave images out")
    selection = Selection(drawn, kept)
    for prompt in prompts:
        question_ids(janus, prompt, selection.wording)
    return selection


def question_ids(janus: LoadedModel, prompt: str, wording: Wording) -> list[int]:
    """Return the token ids of the question about an image of a prompt.

    Raises:
        PromptError: the question does not fit into the context.
    """
    text = wording.question.replace("{prompt}", _as_phrase(prompt))
    return janus.answering_ids([Turn("user", text, 1)])


def _as_phrase(prompt: str) -> str:
    """Return a prompt without a full stop, as the middle of a sentence needs it."""
    return prompt.strip().rstrip(".").rstrip()


def score_images(
    janus: LoadedModel,
    prompt: str,
    images: Sequence[Image.Image],
    wording: Wording = DEFAULT_WORDING,
) -> Iterator[float]:
    """Yield the score of each image against a prompt; call it in the model's thread.

    Scores of one prompt can be compared with each other, and those of several prompts cannot.
    """
    ids = question_ids(janus, prompt, wording)
    # In low-memory mode, encoding an image frees the weights that scoring needs, and the reverse.
    # So several images are encoded before the weights change.
    step = _ENCODED_TOGETHER if janus.low_memory else 1
    for start in range(0, len(images), step):
        encoded_now = images[start : start + step]
        pixels = [preprocess(image, janus.config.image) for image in encoded_now]
        for features in janus.encode(pixels):
            yield _score(janus, ids, features, prompt, wording)


def _score(
    janus: LoadedModel, ids: Sequence[int], features: mx.array, prompt: str, wording: Wording
) -> float:
    """Return the score of an image.

    Args:
        janus: the model.
        ids: the question.
        features: the encoded image, (tokens, hidden).
        prompt: the prompt of the image.
        wording: the wording of the question.
    """

    def encoded(_: Stopwatch) -> list[mx.array]:
        return [features]  # already encoded, so there is nothing to time

    if wording.yes_no:
        yes, no = score_answers(janus, ids, encoded, ["yes", "no"], spellings=True)
        return yes.logprob - no.logprob
    caption = f" {_as_phrase(prompt)}"  # models begin an answer with a space
    return score_answers(janus, ids, encoded, [caption], spellings=False)[0].logprob


class Draw(Protocol):
    """A function that checks a request and returns the steps of generating its images."""

    def __call__(
        self, jobs: Sequence[ImageJob], *, reset_peak: bool
    ) -> Generator[ImageStep, None, None]:
        """Return the steps. ``reset_peak``: whether the first step resets MLX's peak memory."""


def best_of_steps(
    janus: LoadedModel, jobs: Sequence[ImageJob], selection: Selection, draw: Draw
) -> Generator[ImageStep, None, None]:
    """Check a request, and return the steps that choose the best images of each prompt.

    Args:
        janus: the model.
        jobs: ``selection.drawn`` jobs of each prompt, one prompt after the other.
        selection: how many images to keep, and how to score them.
        draw: generates images, such as ``reasoned_steps``.

    Raises:
        JanusError: as ``draw``.
    """
    draw(jobs, reset_peak=False).close()  # checks the request, and generates nothing
    return _chosen(janus, jobs, selection, draw)


def _chosen(
    janus: LoadedModel, jobs: Sequence[ImageJob], selection: Selection, draw: Draw
) -> Generator[ImageStep, None, None]:
    """Generate and score the images of each prompt, and yield the best ones, best first.

    The images of a prompt are scored before those of the next prompt are drawn. So memory holds all
    images of one prompt only. Closing the generator ends the work.

    Args:
        janus: the model.
        jobs: ``selection.drawn`` jobs of each prompt, one prompt after the other.
        selection: how many images to keep, and how to score them.
        draw: generates images.

    Yields:
        A step without images after each step of generating, after each image is decoded, and after
            each image is scored; then a step with each image that is kept. The total never falls.
    """
    done = 0  # steps of earlier prompts
    total = 0
    kept: list[GeneratedImage] = []
    for start in range(0, len(jobs), selection.drawn):
        group = jobs[start : start + selection.drawn]
        later = (len(jobs) - start) // selection.drawn - 1  # prompts after this one
        drawing = draw(group, reset_peak=start == 0)
        stream = _candidates(janus, group, selection.wording, drawing)
        candidates: list[GeneratedImage] = []
        index = 0  # steps done for this prompt
        expected = 0  # steps of a prompt if no image is drawn again
        try:
            for step in stream:
                index = step.index
                expected = expected or step.total  # the total grows when an image is drawn again
                total = max(total, done + step.total + later * expected)
                candidates += step.images
                yield replace(step, index=done + index, total=total, images=())
        finally:
            stream.close()
        # If the last prompt took fewer steps than expected, the others count as done.
        done = done + index if later else total
        for image in _ranked(candidates)[: selection.kept]:
            kept.append(image)
            shown = [one.image for one in kept]
            yield ImageStep(done, total, (image,), partial(list, shown))


def _candidates(
    janus: LoadedModel,
    jobs: Sequence[ImageJob],
    wording: Wording,
    drawing: Generator[ImageStep, None, None],
) -> Generator[ImageStep, None, None]:
    """Generate and score the images of one prompt.

    Args:
        janus: the model.
        jobs: the images, all of one prompt.
        wording: the question of the score.
        drawing: the steps that generate them.

    Yields:
        A step after each step of generating, after each image is decoded, and after each image is
            scored. A step of scoring has the scored image. A preview shows only unfinished images.
    """
    images: list[GeneratedImage] = []
    index = 0
    total = 0
    try:
        for step in drawing:
            images += step.images
            index = step.index + len(images)  # decoding an image counts as a step
            total = step.total + 2 * len(jobs)  # each image is decoded and scored
            yield ImageStep(index, total, (), partial(_in_progress, step, len(images)))
    finally:
        drawing.close()
    scores = score_images(janus, jobs[0].prompt, [image.image for image in images], wording)
    for image, score in zip(images, scores, strict=True):
        # No image is unfinished now, so the preview is an empty list.
        index += 1
        yield ImageStep(index, total, (replace(image, score=score),), list)


def _in_progress(step: ImageStep, finished: int) -> list[Image.Image]:
    """Return the preview of a step without the images that are finished, which come first."""
    return step.preview()[finished:]


def _ranked(images: Sequence[GeneratedImage]) -> list[GeneratedImage]:
    """Return scored images with their ranks, best first; of equal ones, the lower seed first.

    The metadata record the rank, the score and the number of images.
    """
    ranked = sorted(images, key=lambda image: (-(image.score or 0.0), image.seed))
    results = []
    for rank, image in enumerate(ranked, 1):
        facts = {"best_of": str(len(ranked)), "rank": str(rank), "score": f"{image.score:.6g}"}
        results.append(replace(image, rank=rank, metadata=image.metadata | facts))
    return results
