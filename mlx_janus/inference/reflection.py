"""Drawing with reflection: the model draws, judges the image, and draws again if it does not match.

Janus-Pro-R1 was trained for this. A judgement follows the prompt, the image as the vision encoder
sees it, and a question; it begins with Yes or No. If it is No, the image is drawn again, after the
prompt, the earlier image as image tokens, and the judgement.

Source: ``inference.py`` of Janus-Pro-R1 (arXiv 2506.01480).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import mlx.core as mx
from PIL import Image

from ..decode.prefill import prefill_all
from ..decode.sampling import choose, derive_seed
from ..decode.text import PREFILL_STEP
from ..decode.text_options import TextOptions
from ..errors import ContextLengthError, OptionError
from ..limits import MAX_REFLECT, check_int
from ..processing.images import preprocess
from .image_generation import generate_steps, group_jobs
from .loaded import LoadedModel
from .pathway import EarlierImage, ImageJob, ReasoningPathway
from .pathways import pathway_of
from .results import DrawingRound, GeneratedImage, ImageStep, Stage, rounds_metadata
from .text_generation import Prompt, answer_events, answer_pieces, embed_prompt
from .text_steps import text_steps

MAX_JUDGEMENT_TOKENS = 80
_QUESTION = "\nLet me think Does this image match the prompt..."
_ANSWERS = ("Yes", "No")
_ANNOUNCEMENT = "\nNext, I will draw a new image"

Steps = Generator[ImageStep, None, None]
"""Steps of a drawing."""


@dataclass(frozen=True)
class Judgement:
    """A model's judgement of an image that it drew."""

    matches: bool  # whether the answer begins with Yes
    probability: float  # of Yes against No, before temperature
    tokens: tuple[int, ...]  # the answer with its Yes or No, without an end token
    words: str  # the answer

    def round_of(self, image: Image.Image) -> DrawingRound:
        """Return the round of a drawing: ``image``, and this judgement of it."""
        return DrawingRound(image, self.matches, self.words, self.probability)


def check_reflect(janus: LoadedModel, reflect: object, *, edits: bool) -> int:
    """Check the option ``reflect``: how often an image is judged and drawn again, at most.

    Args:
        janus: the model.
        reflect: the option's value.
        edits: whether images are to be changed.

    Raises:
        OptionError: the value is out of range. Or it is above 0, and images are to be changed or
            the model cannot judge images.
    """
    rounds = check_int("reflect", reflect, 0, MAX_REFLECT)
    if rounds and edits:
        raise OptionError("reflect is for drawing prompts: leave reflect or images out")
    if rounds and not isinstance(pathway_of(janus), ReasoningPathway):
        raise OptionError(
            "this model cannot draw again after a judgement, as models that draw image tokens can: "
            "leave reflect out"
        )
    return rounds


def judge_ids(janus: LoadedModel, ids: Sequence[int]) -> list[int]:
    """Return the token ids of the question for a judgement: prompt, image and question.

    Args:
        janus: the model.
        ids: the prompt of the image, which ends with image_start.
    """
    prompts = janus.prompts
    placeholders = [prompts.special.image] * prompts.image_tokens
    return [*ids, *placeholders, *prompts.after_image(_QUESTION)]


def redraw_job(
    janus: LoadedModel, job: ImageJob, image: Image.Image, tokens: Sequence[int], seed: int
) -> ImageJob:
    """Return the job that draws an image again after its judgement.

    Args:
        janus: the model.
        job: the first drawing of the image.
        image: its newest drawing.
        tokens: the judgement of this drawing.
        seed: the seed of the new drawing.

    Raises:
        ContextLengthError: the context has no room for another image.
    """
    pathway = pathway_of(janus)
    assert isinstance(pathway, ReasoningPathway)  # ``check_reflect`` has checked it
    prompts = janus.prompts
    judgement = [
        *prompts.after_image(_QUESTION),
        *tokens,
        *prompts.before_image(_ANNOUNCEMENT),
    ]
    ids = pathway.redraw_prompt_ids(job.ids, judgement)
    return replace(job, ids=ids, seed=seed, earlier=EarlierImage(image, len(job.ids)))


def check_room(janus: LoadedModel, job: ImageJob) -> ImageJob:
    """Check that the context has room for the longest judgement of an image and another image.

    Returns:
        The job that was given.

    Raises:
        ContextLengthError: the context has no room.
    """
    context = janus.config.language.max_position_embeddings
    longest = [janus.prompts.special.eos] * MAX_JUDGEMENT_TOKENS  # any id: only the number counts
    fits = len(judge_ids(janus, job.ids)) + len(longest) <= context
    any_image = Image.new("RGB", (1, 1))
    try:
        redraw_job(janus, job, any_image, longest, seed=0)
    except ContextLengthError:
        fits = False
    if not fits:
        raise ContextLengthError(
            f"the prompt is {len(job.ids)} tokens long, and this model's maximum context length of "
            f"{context} has no room for a judgement: shorten the prompt, or leave reflect out"
        )
    return job


def judge(
    janus: LoadedModel, ids: Sequence[int], image: Image.Image, temperature: float, seed: int
) -> Generator[str, None, Judgement]:
    """Ask the model whether an image that it drew matches the prompt.

    The first token is chosen between Yes and No only.

    Args:
        janus: the model.
        ids: the prompt of the image.
        image: the image.
        temperature: the sampling temperature.
        seed: the seed of the sampling.

    Yields:
        Pieces of the answer.

    Returns:
        The judgement.
    """
    all_ids = judge_ids(janus, ids)
    features = janus.encode([preprocess(image, janus.config.image)])
    janus.load_weights_for("answer")
    cache = janus.model.make_cache()
    embeddings = embed_prompt(janus, all_ids, features)
    hidden = prefill_all(janus.model, embeddings[None], cache, PREFILL_STEP)
    del embeddings, features
    first, matches, probability = _choose_verdict(janus, hidden, temperature, seed)
    options = TextOptions(max_tokens=MAX_JUDGEMENT_TOKENS - 1, temperature=temperature, seed=seed)
    prompt = Prompt(
        ids=[*all_ids, first],
        features=lambda _: [],  # the image is in the cache
        cache=cache,
        read=len(all_ids),
        continues=True,
        reset_peak=False,
    )
    yield janus.prompts.decode([first])
    later = yield from answer_pieces(answer_events(janus, prompt, options))
    tokens = (first, *later)
    return Judgement(matches, probability, tokens, janus.prompts.decode(tokens))


def _choose_verdict(
    janus: LoadedModel, hidden: mx.array, temperature: float, seed: int
) -> tuple[int, bool, float]:
    """Choose between Yes and No.

    Args:
        janus: the model.
        hidden: the last hidden state of the question, (1, hidden).
        temperature: the sampling temperature.
        seed: the seed of the judgement.

    Returns:
        The chosen token, whether it is Yes, and the probability of Yes against No.
    """
    # If an answer has several tokens, its last one represents it, as in Janus-Pro-R1's code.
    answers = [janus.prompts.encode(answer)[-1] for answer in _ANSWERS]
    logits = janus.model.text_logits(hidden)[:, mx.array(answers)].astype(mx.float32)  # (1, 2)
    key = mx.random.key(derive_seed(seed, "verdict"))
    chosen = cast(int, choose(logits, key[None], temperature).item())  # 0: Yes; 1: No
    probability = cast(float, mx.softmax(logits, axis=-1)[0, 0].item())
    return answers[chosen], chosen == 0, probability


def reflected_steps(
    janus: LoadedModel,
    jobs: Sequence[ImageJob],
    rounds: int,
    temperature: float,
    *,
    reset_peak: bool = True,
) -> Steps:
    """Generate the images of jobs; judge each, and draw it again until it matches.

    Args:
        janus: the model.
        jobs: images with equal options.
        rounds: how often an image is judged and drawn again, at most. The last drawing is not
            judged.
        temperature: the temperature of judgements.
        reset_peak: whether MLX's peak memory is counted from here.

    Yields:
        The steps of the drawings and, with ``stage`` "judge", of the judgements. The total grows
            when an image is drawn again. Images are finished in the order of ``group_jobs``.
    """
    if reset_peak:
        mx.reset_peak_memory()
    groups = group_jobs(janus, pathway_of(janus), jobs)
    reflection = _Reflection(janus, rounds, temperature, len(groups), jobs[0])
    for group in groups:
        yield from reflection.draw_group(group)


class _Reflection:
    """The rounds of a request, and the count of its steps.

    Args:
        janus: the model.
        rounds: how often an image is judged and drawn again, at most.
        temperature: the temperature of judgements.
        groups: number of groups of images that are drawn together.
        job: any of the jobs, for their options.
    """

    def __init__(
        self, janus: LoadedModel, rounds: int, temperature: float, groups: int, job: ImageJob
    ):
        self._janus = janus
        self._rounds = rounds
        self._temperature = temperature
        self._steps = pathway_of(janus).steps(job.options)  # the steps of one group
        self._later = groups * self._steps  # steps of the groups that have not begun
        self._done = 0  # steps
        self._finished: list[Image.Image] = []
        # Returns the preview of the newest drawings.
        self._drawing: Callable[[], list[Image.Image]] = list

    def draw_group(self, jobs: Sequence[ImageJob]) -> Steps:
        """Draw a group of images in all their rounds, and yield the steps."""
        self._later -= self._steps
        drawn = yield from self._draw(jobs)
        drawings = {job: [image] for job, image in zip(jobs, drawn, strict=True)}
        rounds: dict[ImageJob, list[DrawingRound]] = {job: [] for job in jobs}
        unmatched = list(jobs)
        for number in range(1, self._rounds + 1):
            redraws: dict[ImageJob, ImageJob] = {}
            for job in unmatched:
                image = drawings[job][-1].image
                judgement = yield from self._judge(job, image, number)
                rounds[job].append(judgement.round_of(image))
                if not judgement.matches:
                    seed = derive_seed(job.seed, f"drawing {number}")
                    redraws[job] = redraw_job(self._janus, job, image, judgement.tokens, seed)
            unmatched = list(redraws)
            if not unmatched:
                break
            redrawn = yield from self._draw(list(redraws.values()))
            for job, redrawn_image in zip(unmatched, redrawn, strict=True):
                drawings[job].append(redrawn_image)
        self._drawing = list  # no image is in progress
        for job in jobs:
            if job in unmatched:  # the last drawing is not judged
                rounds[job].append(DrawingRound(drawings[job][-1].image, None))
            result = _result(drawings[job], rounds[job], self._rounds)
            self._finished.append(result.image)
            yield ImageStep(self._done, self._total, (result,), self._preview_function())

    @property
    def _total(self) -> int:
        """The steps that are done, and those of the groups that have not begun."""
        return self._done + self._later

    def _draw(self, jobs: Sequence[ImageJob]) -> Generator[ImageStep, None, list[GeneratedImage]]:
        """Draw images once; yield the steps without finished images, and return the images."""
        images: dict[tuple[str, int], GeneratedImage] = {}
        start = self._done
        with contextlib.closing(generate_steps(self._janus, jobs, reset_peak=False)) as steps:
            for step in steps:
                self._done = start + step.index
                total = start + step.total + self._later
                images |= {(image.prompt, image.seed): image for image in step.images}
                # The first finished drawing ends the group's drawing, and its judgements follow.
                stage: Stage = "judge" if step.images else "draw"
                self._drawing = step.preview
                yield ImageStep(self._done, total, (), self._preview_function(), stage)
        return [images[job.prompt, job.seed] for job in jobs]

    def _judge(
        self, job: ImageJob, image: Image.Image, number: int
    ) -> Generator[ImageStep, None, Judgement]:
        """Judge a drawing; yield a step for each piece of the answer."""
        seed = derive_seed(job.seed, f"judgement {number}")
        pieces = judge(self._janus, job.ids, image, self._temperature, seed)
        to_step = partial(ImageStep, self._done, self._total, (), self._preview_function(), "judge")
        judgement = yield from text_steps(pieces, to_step)
        return judgement

    def _preview_function(self) -> Callable[[], list[Image.Image]]:
        """Return a function that returns the finished images, and then the newest drawings."""
        return partial(_preview, list(self._finished), self._drawing)


def _preview(
    finished: list[Image.Image], decode_others: Callable[[], list[Image.Image]]
) -> list[Image.Image]:
    """Return the finished images, and then previews of the others."""
    return finished + decode_others()


def _result(
    drawings: Sequence[GeneratedImage], rounds: Sequence[DrawingRound], reflect: int
) -> GeneratedImage:
    """Return the finished image: its last drawing, with the seed of the first and all rounds.

    Args:
        drawings: the drawings of one image, in order.
        rounds: the same drawings, judged.
        reflect: how often an image is judged and drawn again, at most.
    """
    first = drawings[0]
    return replace(
        drawings[-1],
        seed=first.seed,
        metadata=first.metadata | rounds_metadata(rounds, reflect),
        passes=sum(drawing.passes for drawing in drawings),
        steps=sum(drawing.steps for drawing in drawings),
        rounds=tuple(rounds),
    )
