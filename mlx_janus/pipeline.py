"""The public API: ``load`` returns a ``JanusPipeline``, which reads and generates images."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import mlx.core as mx

from .config import check_roles
from .decode.text_options import SamplingArguments
from .errors import OptionError
from .inference.best_of import best_of_steps, check_selection
from .inference.conversation import Conversation
from .inference.editing import read_inputs
from .inference.image_arguments import ImageArguments, ImageRequest
from .inference.image_generation import Seed, image_jobs, sort_by_prompt
from .inference.loaded import LoadedModel, Stopwatch
from .inference.model_thread import ThreadStream
from .inference.pathways import pathway_of
from .inference.reasoning import reasoned_steps
from .inference.results import GeneratedImage, ImageStep, TextChunk, TextResult
from .inference.scoring import AnswerScore, score_answers
from .inference.text_generation import (
    Prompt,
    answer_chunks,
    answer_events,
    as_strings,
    last_result,
    text_options,
)
from .limits import check_keywords, check_text
from .processing.images import ImageSource, as_images, open_image, preprocess
from .processing.prompts import Prompts, Turn, marked_question
from .threads import check_usable
from .weights.addresses import NO_MODEL
from .weights.folder import read_stamp
from .weights.load import WeightFiles, load_model
from .weights.names import TINY, understand_name
from .weights.sources import find_converted

if TYPE_CHECKING:
    from .decode.text import TextOptions
    from .inference.pathway import ImagePathway
    from .weights.folder import Progress

_LOG = logging.getLogger("mlx_janus")  # Python prints its warnings to stderr by default
_NO_MODEL_WARNING = (
    "No model is named: this is Janus-Tiny, which knows coloured shapes and nothing else. "
    'For a real one: path_or_hub_id="deepseek-ai/Janus-Pro-1B"'
)


def load(
    path_or_hub_id: str | os.PathLike[str] | None = None,
    *,
    bits: int | None = None,
    recipe: str | None = None,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    low_memory: bool = False,
    roles: str | None = None,
    vae: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> JanusPipeline:
    """Load a model for use in any thread. Weights are read from disk on first use.

    Args:
        path_or_hub_id: a folder that ``convert`` wrote, a PyTorch model folder in DeepSeek's or
            transformers' layout, or the Hub id, short name ("janus-pro-1b") or address of either,
            with or without "@revision". PyTorch models are converted once, into the cache folder.
            None: Janus-Tiny, the small model inside the package; a warning is logged.
        bits: 8 or 4 to quantize the language model; None: keep the model as it is.
        recipe: a named quantization in place of ``bits``. "light", "balanced" and "faithful" choose
            the bits of each layer, from the smallest model to the closest to the float model;
            "mxfp4", "mxfp8" and "nvfp4" are MLX's small float formats.
        dtype: "float32", "bfloat16", "float16" or an MLX dtype; None: float32 on a CPU, otherwise
            the model's own.
        revision: branch, tag or commit on the Hub.
        low_memory: hold only the weights of the current task in memory. The tasks are: read images,
            answer, generate image tokens, and decode them to pixels. Weights are read from disk
            again when a task needs them. Results are the same.
        roles: the roles in prompts: "pro" for <|User|> and <|Assistant|>, as Janus-Pro was trained,
            or "plain" for User and Assistant, as Janus-1.3B was. None: the model's own, which
            ``janus.config.prompt`` has.
        vae: JanusFlow's autoencoder, a folder or Hub id in diffusers' layout, for a model that is
            not converted yet; None: "stabilityai/sdxl-vae".
        progress: called in this thread during a conversion, with the stage, the bytes done and the
            total bytes. An error that it raises ends the conversion.

    Raises:
        JanusError: the model is missing, unsupported, damaged, or too large for the memory. Each
            case has a subclass in ``mlx_janus.errors``.
    """
    check_usable()
    check_roles(roles)  # before a download
    source = _use_tiny(revision) if path_or_hub_id is None else path_or_hub_id
    dtype_name = None if dtype is None else str(dtype).removeprefix("mlx.core.")  # of an mx.Dtype
    precision: dict[str, Any] = {"bits": bits, "recipe": recipe, "dtype": dtype_name}
    folder = find_converted(
        source, revision=revision, low_memory=low_memory, vae=vae, progress=progress, **precision
    )
    name = understand_name(source, revision).shown
    return _make_pipeline(folder, name, roles=roles, low_memory=low_memory, **precision)


def _make_pipeline(
    folder: Path, name: str, *, roles: str | None, low_memory: bool, **precision: Any
) -> JanusPipeline:
    """Load a converted folder, and return its pipeline.

    Args:
        folder: the converted folder.
        name: the model's name, for the metadata of images.
        roles: as for ``load``.
        low_memory: as for ``load``.
        precision: ``bits``, ``recipe`` and ``dtype``, as for ``load_model``.

    Raises:
        JanusError: as for ``load``.
    """
    model = load_model(folder, low_memory=low_memory, roles=roles, **precision)
    prompts = Prompts.load(
        folder,
        model.config.prompt,
        image_tokens=model.config.embeddings_per_image,
        with_start=not model.config.aligner.begin_positions,
    )
    files = WeightFiles.of(folder) if low_memory else None
    source = read_stamp(folder).get("source", "")
    return JanusPipeline(model, prompts, name=name, roles=roles, files=files, source=source)


def _use_tiny(revision: str | None) -> Path:
    """Return the folder of Janus-Tiny, and log a warning that no model is named.

    Raises:
        OptionError: ``revision`` is not None, although only models on the Hub have revisions.
    """
    if revision is not None:
        raise OptionError(f"a revision is of a model on the Hub: {NO_MODEL}")
    _LOG.warning(_NO_MODEL_WARNING)
    return TINY


class JanusPipeline(LoadedModel):
    """A loaded model that answers questions about images and generates images. Made by ``load``.

    Any thread may use it. The work runs in one thread of the model, one step at a time. Several
    streams take turns step by step, so a stream that is paused, closed or no longer used does not
    block the others. Any thread may advance and close a stream, one thread at a time.

    In low-memory mode, changing from one stream to another reads weights from disk again, so read
    one stream to its end before starting the next.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pathway(self) -> ImagePathway:
        """The model's way to generate images, for the package's own engine and commands."""
        return pathway_of(self)

    # Generating text

    def generate_text(
        self,
        prompt: str,
        images: Sequence[ImageSource] | ImageSource = (),
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        system: str | None = None,
        stop: Sequence[str] | str = (),
        lookup: int = 0,
        **sampling: Unpack[SamplingArguments],
    ) -> TextResult:
        """Answer a question, with or without images. The result has token counts and speeds too.

        Args:
            prompt: the question. ``{image}`` marks the place of an image, one for each; without
                marks, the images come first.
            images: an image or several, each a path, a PIL image or the bytes of an image file.
            max_tokens: the maximum length of the answer.
            temperature: randomness of sampling; 0 always takes the most likely token.
            top_p: share of the probability that nucleus sampling keeps, in the most likely tokens;
                1: all of it; 0: only the most likely token.
            seed: seed of the sampling; None or -1: a random one.
            system: system prompt; None: the model's own, "": none.
            stop: a string or several that end the answer; they are not part of it.
            lookup: draft tokens in each pass of prompt lookup decoding; the answer stays the same.
            sampling: further arguments, see ``SamplingArguments``.

        Raises:
            PromptError: the question is empty or too long, or its marks are not one for each image.
            ImageError: an image cannot be read.
            OptionError: a type is wrong, a number is out of range, or a stop string is empty.
        """
        check_keywords("generate_text", sampling, SamplingArguments.__annotations__)
        stream = self.stream_text(
            prompt,
            images,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            system=system,
            stop=stop,
            lookup=lookup,
            **sampling,
        )
        return last_result(stream)

    def stream_text(
        self,
        prompt: str,
        images: Sequence[ImageSource] | ImageSource = (),
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        system: str | None = None,
        stop: Sequence[str] | str = (),
        lookup: int = 0,
        **sampling: Unpack[SamplingArguments],
    ) -> ThreadStream[TextChunk]:
        """Answer a question and stream the answer in pieces.

        Arguments and exceptions are those of ``generate_text``; arguments are checked before the
        call returns. Closing the stream ends the answer within a step.

        Returns:
            An iterator over pieces of text; the last one has the result.
        """
        check_keywords("stream_text", sampling, SamplingArguments.__annotations__)
        check_text("prompt", prompt)
        sources = as_images(images)
        turn = marked_question(prompt, len(sources))
        options = text_options(
            max_tokens,
            temperature,
            top_p,
            seed,
            stop,
            lookup,
            **sampling,
        )
        return self.stream_turns([turn], sources, options=options, system=system)

    def stream_turns(
        self,
        turns: Sequence[Turn],
        images: Sequence[ImageSource],
        *,
        options: TextOptions,
        system: str | None = None,
    ) -> ThreadStream[TextChunk]:
        """Answer the last turn of a conversation, and stream the answer in pieces.

        Each call reads the entire conversation. Use ``conversation`` instead to read only the new
        part of each prompt.

        Args:
            turns: messages. If the last one is the assistant's, the answer continues its text.
                ``{image}`` in a message is ordinary text.
            images: the images of all turns, in order.
            options: sampling, length and stop strings.
            system: system prompt; None: the model's own, "": none.

        Returns:
            An iterator over pieces of text; the last one has the result.

        Raises:
            PromptError: no turn is the user's, a question has neither text nor images, or the
                conversation does not fit into the context.
            ImageError: an image cannot be read.
            OptionError: ``images`` has more or fewer images than the turns together, or an option
                does not suit the model.
        """
        self.check_text_options(options, turns)
        expected = sum(turn.images for turn in turns)
        if expected != len(images):
            raise OptionError(f"the turns show {expected} images, {len(images)} were given")
        ids = self.answering_ids(turns, system)
        pixels = [preprocess(open_image(image), self.config.image) for image in images]

        def features(stopwatch: Stopwatch) -> list[mx.array]:
            """Encode the images. The stream's first step calls this in the model's thread."""
            return self.encode(pixels, stopwatch)

        continues = turns[-1].role == "assistant"
        events = answer_events(self, Prompt(ids, features, continues=continues), options)
        return self.thread.stream(answer_chunks(events))

    def conversation(self, system: str | None = None) -> Conversation:
        """Start a conversation, which keeps its KV cache between questions.

        Args:
            system: system prompt; None: the model's own, "": none.
        """
        return Conversation(self, system)

    def score(
        self,
        prompt: str,
        answers: Sequence[str] | str,
        images: Sequence[ImageSource] | ImageSource = (),
        *,
        system: str | None = None,
        spellings: bool = False,
    ) -> list[AnswerScore]:
        """Return how likely the model finds each of given answers to a question.

        To let the model choose among the answers, take the one with the highest ``logprob``. The
        scores do not include an end token.

        Args:
            prompt: the question, with ``{image}`` marks as for ``generate_text``.
            answers: an answer or several, as they follow the prompt. Models often begin an answer
                with a space, so " yes" and "yes" have different likelihoods.
            images: as for ``generate_text``.
            system: system prompt; None: the model's own, "": none.
            spellings: whether to sum the probabilities of an answer with and without a space before
                it, and with a small or a capital first letter.

        Returns:
            The scores, in the order of the answers.

        Raises:
            PromptError: the question is empty or too long, or its marks are not one for each image.
            ImageError: an image cannot be read.
            OptionError: a type is wrong, there is no answer, or an answer is empty.
        """
        check_text("prompt", prompt)
        texts = as_strings("answers", answers)
        sources = as_images(images)
        ids = self.answering_ids([marked_question(prompt, len(sources))], system)
        pixels = [preprocess(open_image(image), self.config.image) for image in sources]

        def features(stopwatch: Stopwatch) -> list[mx.array]:
            """Encode the images, in the model's thread."""
            return self.encode(pixels, stopwatch)

        return self.thread.call(
            lambda: score_answers(self, ids, features, texts, spellings=spellings)
        )

    # Generating images

    def generate_images(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: Seed = None,
        cfg_weight: float | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        exact: bool = False,
        window: int | None = None,
        **further: Unpack[ImageArguments],
    ) -> list[GeneratedImage]:
        """Generate ``n`` images of each prompt, or change given images as it says.

        The result has the order of the prompts, and for each prompt that of the seeds.

        Args:
            prompt: a prompt or several.
            n: images of each prompt, generated together as far as memory allows.
            seed: seed of each prompt's first image; each further image has the next higher one.
                None or -1: a random seed. A list has one seed for each prompt.
            cfg_weight: weight of classifier-free guidance, 1 for none; None: the model's own.
            temperature: randomness of sampling, of plans and judgements too; None: the model's own.
                A rectified flow takes none of ``temperature``, ``top_p``, ``exact``, ``window``,
                ``images``, ``plan`` and ``reflect``.
            top_p: nucleus sampling, as in ``generate_text``.
            exact: generate each image alone and token by token, for reproducible rounding.
            window: positions that one pass reads; None: the fastest by a stored timing.
            further: images to change, plans, reflection, best of N, and steps and latents of a
                rectified flow, see ``ImageArguments``.

        Raises:
            PromptError: a prompt is empty or does not fit into the context, or there is no prompt.
            ImageError: an image cannot be read.
            OptionError: an argument has a wrong type or is out of range, or does not suit another.
        """
        check_keywords("generate_images", further, ImageArguments.__annotations__)
        stream = self.stream_images(
            prompt,
            n=n,
            seed=seed,
            cfg_weight=cfg_weight,
            temperature=temperature,
            top_p=top_p,
            exact=exact,
            window=window,
            **further,
        )
        generated = [image for step in stream for image in step.images]
        if further.get("best_of") is not None:  # these come in the order of prompts and ranks
            return generated
        return sort_by_prompt(generated, as_strings("prompt", prompt))

    def stream_images(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: Seed = None,
        cfg_weight: float | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        exact: bool = False,
        window: int | None = None,
        **further: Unpack[ImageArguments],
    ) -> ThreadStream[ImageStep]:
        """Generate images and stream the steps, with previews.

        Arguments and exceptions are those of ``generate_images``; arguments are checked before the
        call returns. Closing the stream ends the work within a step. Images of prompts with fewer
        tokens are generated first.

        Returns:
            An iterator over steps; a finished image is in the ``images`` of its last step. Steps
            that write a plan or a judgement have its next piece in ``text``.
        """
        check_keywords("stream_images", further, ImageArguments.__annotations__)
        request = ImageRequest(**further)
        choices = {
            "cfg_weight": cfg_weight,
            "temperature": temperature,
            "top_p": top_p,
            "exact": exact,
            "window": window,
            "cfg_weight2": request.cfg_weight2,
            "steps": request.steps,
            "latents": request.latents,
        }
        inputs = read_inputs(self, request.images, request.crop)
        draw = partial(reasoned_steps, self, plan=request.plan, reflect=request.reflect)
        if request.best_of is None:
            return self.thread.stream(draw(image_jobs(self, prompt, n, seed, choices, inputs)))
        prompts = as_strings("prompt", prompt)
        selection = check_selection(self, prompts, n, request.best_of, inputs)
        jobs = image_jobs(self, prompt, selection.drawn, seed, choices)
        return self.thread.stream(best_of_steps(self, jobs, selection, draw))
