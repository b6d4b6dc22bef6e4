"""The public API: ``load`` gives a ``JanusPipeline``, and that gives words for pictures, or pictures for words."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import mlx.core as mx
import numpy as np

from .decode.image import DrawOptions
from .decode.sampling import pick_seed
from .decode.text import TextOptions
from .errors import ConfigError, OptionError, PromptError
from .inference.conversation import Conversation
from .inference.image_generation import Job, stream_pictures
from .inference.results import GeneratedImage, ImageStep, TextChunk, TextResult
from .inference.text_generation import as_strings, stream_answer, text_options
from .limits import MAX_IMAGES, MAX_SEED, MAX_WINDOW, check_int
from .memory import evaluate
from .models.janus import JanusModel
from .processing.images import ImageSource, as_images, open_image, preprocess
from .processing.prompts import Prompts, Turn
from .weights.load import WeightFiles, load_model
from .weights.sources import NO_MODEL, TINY, find_converted, resolve

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .config import JanusConfig
    from .weights.folder import Progress

_LOG = logging.getLogger("mlx_janus")  # Python writes its warnings to stderr unless the application says otherwise
_EMBEDDED = (
    "No model is named: this is Janus-Tiny, which knows coloured shapes and nothing else. "
    "For a real one: --model deepseek-ai/Janus-Pro-1B"
)
Task = Literal["encode", "answer", "draw", "decode"]


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
    """Load a model. Weights are read when something is first computed with them, which MLX allows in this thread alone.

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
    prompts = Prompts.load(folder, model.config.prompt, image_tokens=model.config.understanding.tokens)
    files = WeightFiles.of(folder) if low_memory else None
    return JanusPipeline(model, prompts, name=_display_name(path_or_hub_id), files=files)


def _display_name(path_or_hub_id: str | os.PathLike[str]) -> str:
    path = Path(os.path.expanduser(path_or_hub_id))  # noqa: PTH111  pathlib's raises for the home of nobody
    if path == TINY:
        return "janus-tiny"
    return path.resolve().name if path.is_dir() else os.fspath(path_or_hub_id)


class JanusPipeline:
    """One model, ready to answer and to draw. Made by ``load``.

    While one thread is given an answer or a drawing, another that asks for one waits. A stream belongs to the thread
    that reads it: an app does best to give the model one worker thread (``examples/async_app.py``).

    Args:
        model: its weights, read or not.
        prompts: its tokenizer and templates.
        name: for the metadata of pictures.
        files: where the weights come from, if only those of the task at hand are to be held in memory.
    """

    def __init__(self, model: JanusModel, prompts: Prompts, *, name: str, files: WeightFiles | None = None):
        top = max(prompts.tokenizer.get_vocab(with_added_tokens=True).values())
        if top >= model.config.language.vocab_size:
            raise ConfigError(
                f"the tokenizer's id {top} is beyond the model's vocabulary of {model.config.language.vocab_size}: "
                "tokenizer.json and config.json do not belong together"
            )
        self.model = model
        self.prompts = prompts
        self.name = name
        self.turn = threading.RLock()  # held while an answer or a drawing is under way
        self._files = files
        self._ready: set[Task] = set()  # what weights are there for: in low memory the last one alone

    @property
    def low_memory(self) -> bool:
        """Whether the weights of one task at a time are held."""
        return self._files is not None

    @property
    def config(self) -> JanusConfig:
        """Sizes and facts of the model."""
        return self.model.config

    @property
    def precision(self) -> dict[str, str]:
        """The dtype that is computed in, and if the model is quantized its bits or its recipe."""
        quantization, facts = self.config.quantization, {"dtype": str(self.config.dtype)}
        if quantization is None:
            return facts
        return facts | ({"recipe": quantization.recipe} if quantization.recipe else {"bits": str(quantization.bits)})

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, of the ``tokenizers`` library."""
        return self.prompts.tokenizer

    def prepare(self, task: Task) -> None:
        """Read what a task computes with; in low memory, free what only the one before needed."""
        if task in self._ready:
            return
        arrays = self._arrays(task)
        if self._files:
            last = {name for ready in self._ready for name in self._arrays(ready)}
            if idle := last - set(arrays):
                self._files.free(self.model, idle)
            self._ready.clear()
        evaluate(arrays.values())
        self._ready.add(task)

    def _arrays(self, task: Task) -> dict[str, mx.array]:
        model = self.model
        tasks: dict[Task, Callable[[], dict[str, mx.array]]] = {
            "encode": model.encoding_arrays,
            "answer": model.answering_arrays,
            "draw": model.drawing_arrays,
            "decode": model.decoding_arrays,
        }
        return tasks[task]()

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
        for chunk in self.stream_text(
            prompt,
            images,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            system=system,
            stop=stop,
            lookup=lookup,
        ):
            if chunk.result is not None:
                return chunk.result
        raise AssertionError("a stream ends with its result")

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
    ) -> Iterator[TextChunk]:
        """``generate_text`` piece by piece; arguments are checked before this returns, closing stops within a step."""
        pictures = as_images(images)
        return self.stream_turns(
            [Turn("user", prompt, len(pictures))],
            pictures,
            options=text_options(max_tokens, temperature, top_p, seed, stop, lookup),
            system=system,
        )

    def stream_turns(
        self, turns: Sequence[Turn], images: Sequence[ImageSource], *, options: TextOptions, system: str | None = None
    ) -> Iterator[TextChunk]:
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
        return stream_answer(self, ids, lambda: self.encode(pixels), options)

    def answering_ids(self, turns: Sequence[Turn], system: str | None = None) -> list[int]:
        """Ids of a conversation up to where the assistant speaks; ``system`` as in ``generate_text``.

        Raises:
            PromptError: the last turn is not the user's, a question without words or pictures, or no room for an answer
                in the context.
        """
        ids, context = self.prompts.answering(turns, system), self.config.language.max_position_embeddings
        if len(ids) >= context:
            raise PromptError(
                f"the prompt is {len(ids)} tokens long, pictures included, and the model's context "
                f"{context}: shorten it, or show fewer pictures"
            )
        return ids

    def encode(self, pixels: Sequence[np.ndarray]) -> tuple[list[mx.array], float]:
        """Each preprocessed picture's features, (tokens, hidden), and the seconds spent on them."""
        if pixels:
            self.prepare("encode")
        started, features = time.perf_counter(), []
        for picture in pixels:  # one at a time: the encoder's activations are large
            features.append(self.model.understand(mx.array(picture)[None])[0])
            mx.eval(features[-1])
        return features, time.perf_counter() - started

    def close(self) -> None:
        """End this thread's work with MLX: the last thing that a thread of its own does with the model.

        Without it a program whose model lives in another than the main thread may abort as it exits ("terminate called
        without an active exception"). This thread can compute nothing afterwards.
        """
        mx.clear_streams()

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
        order = {text: i for i, text in reversed(list(enumerate(as_strings(prompt))))}
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
    ) -> Iterator[ImageStep]:
        """``generate_images`` position by position; arguments are checked before this returns, closing cancels.

        Of several prompts, those with the fewest tokens are drawn first.
        """
        check_int("n", n, 1, MAX_IMAGES)
        own = self.config.drawing
        options = DrawOptions(
            own.cfg_weight if cfg_weight is None else cfg_weight,
            own.temperature if temperature is None else temperature,
            top_p,
        )
        first = pick_seed(seed)
        check_int("seed", first, 0, MAX_SEED - n + 1)
        jobs = [
            Job(text, ids, s)
            for text in as_strings(prompt)
            for ids in [self.drawing_ids(text)]
            for s in range(first, first + n)
        ]
        if not jobs:
            raise PromptError("there is no prompt: say what to draw")
        if window is not None:
            check_int("window", window, 1, MAX_WINDOW)
            if exact and window > 1:
                raise OptionError("exact draws token by token: leave window out")
        return stream_pictures(self, jobs, options, exact=exact, window=window)

    def drawing_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt to draw, begin-of-image last.

        Raises:
            PromptError: an empty prompt, or one that leaves a picture no room in the context.
        """
        ids = self.prompts.drawing(prompt)
        context = self.config.language.max_position_embeddings
        if len(ids) + self.config.image_tokens > context:
            raise PromptError(
                f"the prompt is {len(ids)} tokens long and a picture takes {self.config.image_tokens}, more than the "
                f"model's context of {context}: shorten it"
            )
        return ids
