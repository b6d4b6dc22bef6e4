"""The public API: ``load`` gives a ``JanusPipeline``, which answers about images and generates images."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import mlx.core as mx

from .errors import OptionError
from .inference.conversation import Conversation
from .inference.image_generation import generate_steps, image_jobs
from .inference.loaded import LoadedModel, Stopwatch
from .inference.model_thread import ThreadStream
from .inference.pathways import pathway_of
from .inference.results import GeneratedImage, ImageStep, TextChunk, TextResult
from .inference.text_generation import (
    Prompt,
    answer_chunks,
    answer_events,
    as_strings,
    last_result,
    text_options,
)
from .limits import check_text
from .processing.images import ImageSource, as_images, open_image, preprocess
from .processing.prompts import Prompts, Turn
from .weights.load import WeightFiles, load_model
from .weights.sources import NO_MODEL, TINY, find_converted, resolve

if TYPE_CHECKING:
    from .decode.text import TextOptions
    from .inference.pathway import ImagePathway
    from .weights.folder import Progress

_LOG = logging.getLogger(
    "mlx_janus"
)  # Python writes its warnings to stderr unless the application says otherwise
_EMBEDDED = (
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
    progress: Progress | None = None,
) -> JanusPipeline:
    """Load a model, to be used from any thread. Weights are read when something is first computed with them.

    Args:
        path_or_hub_id: a folder that ``convert`` wrote, a PyTorch model folder in DeepSeek's or transformers' layout,
            or the Hub id of either ("deepseek-ai/Janus-Pro-1B", "janus-pro-1b" for short). PyTorch models are converted
            into the cache once. None: Janus-Tiny, the model inside the package, which one logged warning says.
        bits: 8 or 4 to quantize the language model; None takes the model as it is.
        recipe: in place of ``bits``, a choice by name, layer by layer: "light", "balanced" or "faithful", from the
            smallest to the closest to the float model; "mxfp4", "mxfp8" or "nvfp4" for MLX's small floats.
        dtype: "float32", "bfloat16", "float16" or an MLX type; None: the model's own, float32 on a CPU.
        revision: branch, tag or commit on the Hub.
        low_memory: hold the weights of one task at a time: those that read pictures, answer, draw tokens, or make them
            pixels. The others are freed, and read from the folder again when they are needed. Results are the same.
        progress: called with a stage and bytes done and in all, while a model is converted.

    Raises:
        JanusError: of the kind that fits: absent, foreign, damaged, or larger than the memory.
    """
    if path_or_hub_id is None:
        if revision is not None:
            raise OptionError(f"a revision is of a model on the Hub: {NO_MODEL}")
        _LOG.warning(_EMBEDDED)
        path_or_hub_id = TINY
    path_or_hub_id = resolve(path_or_hub_id)
    named = None if dtype is None else str(dtype).removeprefix("mlx.core.")
    folder = find_converted(
        path_or_hub_id,
        bits=bits,
        recipe=recipe,
        dtype=named,
        revision=revision,
        low_memory=low_memory,
        progress=progress,
    )
    model = load_model(folder, bits=bits, recipe=recipe, dtype=named, low_memory=low_memory)
    prompts = Prompts.load(
        folder, model.config.prompt, image_tokens=model.config.understanding.tokens
    )
    files = WeightFiles.of(folder) if low_memory else None
    return JanusPipeline(model, prompts, name=_display_name(path_or_hub_id), files=files)


def _display_name(path_or_hub_id: str | os.PathLike[str]) -> str:
    path = Path(os.path.expanduser(path_or_hub_id))  # noqa: PTH111  pathlib's raises for the home of nobody
    if path == TINY:
        return "janus-tiny"
    return path.resolve().name if path.is_dir() else os.fspath(path_or_hub_id)


class JanusPipeline(LoadedModel):
    """One model, ready to answer and to generate images, from any thread. Made by ``load``.

    The model works in a thread of its own, one step at a time. Streams of several threads take turns step by step; a
    stream that is paused, dropped or closed keeps nobody waiting. Any thread may advance and close a stream, one at a
    time. In low memory every turn reads its weights again: read one stream to its end there.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pathway(self) -> ImagePathway:
        """How this model generates images."""
        return pathway_of(self)

    # Answering

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
    ) -> TextResult:
        """Answer a question, about pictures if there are any.

        Args:
            prompt: the question.
            images: paths, PIL images or bytes, shown before the question in this order.
            max_tokens: where the answer is cut.
            temperature: 0 takes the likeliest token, always.
            top_p: draw from the smallest set of tokens that holds this much probability.
            seed: of the draws; None: a random one. The same seed gives the same answer.
            system: system prompt; None: the model's own, "": none.
            stop: strings that end the answer; they are not part of it.
            lookup: tokens to guess ahead by copying from the prompt and the answer: the same answer, in fewer passes
                where it repeats what was said.

        Raises:
            PromptError: a question without words or pictures, or one longer than the context.
            ImageError: a picture that cannot be read.
            OptionError: a number out of its range.
        """
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
    ) -> ThreadStream[TextChunk]:
        """``generate_text`` piece by piece; arguments are checked before this returns, closing stops within a step."""
        check_text("prompt", prompt)
        pictures = as_images(images)
        return self.stream_turns(
            [Turn("user", prompt, len(pictures))],
            pictures,
            options=text_options(max_tokens, temperature, top_p, seed, stop, lookup),
            system=system,
        )

    def stream_turns(
        self,
        turns: Sequence[Turn],
        images: Sequence[ImageSource],
        *,
        options: TextOptions,
        system: str | None = None,
    ) -> ThreadStream[TextChunk]:
        """Answer the last turn of a conversation, reading it from its beginning.

        Args:
            turns: messages, the last one the user's.
            images: the pictures of all turns, in order.
            options: choice and length.
            system: as in ``generate_text``.
        """
        if (shown := sum(turn.images for turn in turns)) != len(images):
            raise OptionError(f"the turns show {shown} pictures, {len(images)} were given")
        ids = self.answering_ids(turns, system)
        pixels = [preprocess(open_image(image), self.config.image) for image in images]

        def features(watch: Stopwatch) -> list[mx.array]:
            return self.encode(pixels, watch)

        return self.thread.stream(
            answer_chunks(answer_events(self, Prompt(ids, features), options))
        )

    def conversation(self, system: str | None = None) -> Conversation:
        """A new conversation, which keeps what it has read between its turns.

        Args:
            system: system prompt; None: the model's own, "": none.
        """
        return Conversation(self, system)

    # Drawing

    def generate_images(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | None = None,
        cfg_weight: float | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        exact: bool = False,
        window: int | None = None,
    ) -> list[GeneratedImage]:
        """Draw ``n`` pictures of a prompt, or of each of several, in the model's own size.

        Args:
            prompt: what to draw, or several such.
            n: how many of each. Pictures of prompts with as many tokens are drawn together as far as memory allows.
            seed: of a prompt's first picture, the following ones have the next seeds; None: a random one.
            cfg_weight: guidance, how strictly to follow the prompt; None: the model's own (5 for the published ones).
            temperature: 0 takes the likeliest token always; None: the model's own.
            top_p: draw from the smallest set of tokens that holds this much probability.
            exact: draw one by one and token by token, so that rounding cannot tell a picture drawn alone from one drawn
                with others, nor by wide passes.
            window: positions read in one pass of the language model. Only time depends on it, but for rounding; None:
                what is quickest here, by a timing that is kept, and 1 where pictures are drawn together.

        Raises:
            PromptError: an empty prompt, or one longer than the context.
            OptionError: a number out of its range.
        """
        steps = self.stream_images(
            prompt,
            n=n,
            seed=seed,
            cfg_weight=cfg_weight,
            temperature=temperature,
            top_p=top_p,
            exact=exact,
            window=window,
        )
        order = {text: i for i, text in reversed(list(enumerate(as_strings("prompt", prompt))))}
        images = [image for step in steps for image in step.images]
        return sorted(images, key=lambda image: (order[image.prompt], image.seed))

    def stream_images(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | None = None,
        cfg_weight: float | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        exact: bool = False,
        window: int | None = None,
    ) -> ThreadStream[ImageStep]:
        """``generate_images`` position by position; arguments are checked before this returns, closing cancels.

        Of several prompts, those with the fewest tokens are drawn first.
        """
        choices = {
            "cfg_weight": cfg_weight,
            "temperature": temperature,
            "top_p": top_p,
            "exact": exact,
            "window": window,
        }
        jobs = image_jobs(self, prompt, n, seed, choices)
        return self.thread.stream(generate_steps(self, jobs))
