"""A loaded model: its weights, its prompts and its thread, below the public API."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import mlx.core as mx
import numpy as np

from ..errors import ConfigError, JanusError, PromptError
from ..memory import materialize
from ..models.janus import JanusModel
from ..processing.prompts import Prompts, Turn
from ..weights.load import WeightFiles
from .model_thread import CLOSED, ModelThread

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..config import JanusConfig

Task = Literal["encode", "answer", "draw", "decode"]
TASKS: tuple[Task, ...] = get_args(Task)
"""Read images, answer, generate image tokens, turn them into pixels: each has its own weights."""


class ModelCache(Protocol):
    """Arrays that a model computed and that are kept for later."""

    def clear(self) -> None:
        """Free them."""


class Stopwatch:
    """Adds up the seconds spent inside ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


class LoadedModel:
    """A model ready to generate text and images.

    Its functions run in the thread that calls them; ``thread`` is where the public API has them called.

    Args:
        model: the weights, read or not.
        prompts: the tokenizer and templates.
        name: for the metadata of images.
        files: where weights are read again, if only those of the current task are to be held in memory.

    Raises:
        ConfigError: the tokenizer has ids beyond the model's vocabulary.
    """

    def __init__(
        self, model: JanusModel, prompts: Prompts, *, name: str, files: WeightFiles | None = None
    ):
        top = max(prompts.tokenizer.get_vocab(with_added_tokens=True).values())
        if top >= model.config.language.vocab_size:
            raise ConfigError(
                f"the tokenizer's id {top} is beyond the model's vocabulary of {model.config.language.vocab_size}: "
                "tokenizer.json and config.json do not belong together"
            )
        self._model: JanusModel | None = model
        self.prompts = prompts
        self.name = name
        self.thread = ModelThread()
        self.caches: weakref.WeakSet[ModelCache] = weakref.WeakSet()  # emptied by ``close``
        self._files = files
        self._ready: set[Task] = (
            set()
        )  # tasks whose weights are read; in low memory only the current one

    @property
    def model(self) -> JanusModel:
        """The networks.

        Raises:
            JanusError: the model is closed.
        """
        if self._model is None:
            raise JanusError(CLOSED)
        return self._model

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
        """The dtype of computation, and the bits or the recipe of a quantized model."""
        facts = {"dtype": str(self.config.dtype)}
        quantization = self.config.quantization
        if quantization is None:
            return facts
        if quantization.recipe:
            return facts | {"recipe": quantization.recipe}
        return facts | {"bits": str(quantization.bits)}

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, of the ``tokenizers`` library."""
        return self.prompts.tokenizer

    def load_weights_for(self, task: Task) -> None:
        """Read the weights that a task computes with. In low memory, free the previous task's first."""
        if task in self._ready:
            return
        arrays = self._arrays(task)
        if self._files:
            held = {name for ready in self._ready for name in self._arrays(ready)}
            if idle := held - set(arrays):
                self._files.free(self.model, idle)
            self._ready.clear()
        materialize(arrays.values(), self.thread.check)
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

    def answering_ids(self, turns: Sequence[Turn], system: str | None = None) -> list[int]:
        """Return the ids of a conversation up to where the assistant speaks.

        Args:
            turns: messages, the last one the user's.
            system: system prompt; None: the model's own, "": none.

        Raises:
            PromptError: the last turn is not the user's, a question without words or images, or no room for an answer
                in the context.
        """
        ids = self.prompts.answering(turns, system)
        context = self.config.language.max_position_embeddings
        if len(ids) >= context:
            raise PromptError(
                f"the prompt is {len(ids)} tokens long, pictures included, and the model's context "
                f"{context}: shorten it, or show fewer pictures"
            )
        return ids

    def encode(
        self, pixels: Sequence[np.ndarray], watch: Stopwatch | None = None
    ) -> list[mx.array]:
        """Return the features of each preprocessed image, (tokens, hidden); ``watch`` times it without the loading."""
        if not pixels:
            return []
        self.load_weights_for("encode")
        features = []
        with watch or Stopwatch():
            for image in pixels:  # one at a time: the encoder's activations are large
                features.append(self.model.understand(mx.array(image)[None])[0])
                mx.eval(features[-1])
        return features

    def close(self) -> None:
        """Free the model's memory and end its thread; nothing else is touched, no other model and no array.

        A step under way ends first. Everything that is asked of the model afterwards is refused.
        """
        self.thread.close()
        if self._model is None:
            return
        self._model = None
        self._ready.clear()
        for cache in list(self.caches):
            cache.clear()
        gc.collect()  # parts of a network refer to each other
        mx.clear_cache()
