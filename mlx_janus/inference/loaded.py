"""A loaded model: its weights, its prompts and its thread, below the public API."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import mlx.core as mx
import numpy as np

from ..errors import ConfigError, ContextLengthError, JanusError
from ..memory import materialize
from ..models.janus import JanusModel
from ..processing.prompts import Prompts, Turn
from ..threads import is_forked
from ..weights.load import WeightFiles
from .model_thread import CLOSED, ModelThread

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..config import JanusConfig
    from ..decode.text import TextOptions

Task = Literal["encode", "answer", "draw", "decode", "tokenize"]
"""A task of a model, with its own weights.

"encode" reads images, "answer" generates text, "draw" generates an image's tokens, "decode" turns
them into pixels, and "tokenize" turns pixels into tokens, to change an image.
"""
TASKS: tuple[Task, ...] = ("encode", "answer", "draw", "decode")
"""The tasks of answering and generating images."""


class ModelCache(Protocol):
    """Arrays that a model computed and that are kept for later."""

    def clear(self) -> None:
        """Free the arrays."""


class Stopwatch:
    """A timer that adds up the seconds spent inside its ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0  # time of the last entry

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


class LoadedModel:
    """A model ready to generate text and images.

    Methods run in the thread that calls them. The public API calls them in ``thread``.

    Args:
        model: the network; its weights are read when a task needs them.
        prompts: the tokenizer and templates.
        name: the model's name, for the metadata of images.
        roles: the pair of roles that was requested in place of the model's own; None: none was.
        files: turns on low-memory mode, which holds only the weights of the current task, and reads
            weights from these files again when a task needs them. None: hold all weights.

    Raises:
        ConfigError: the tokenizer has ids beyond the model's vocabulary.
    """

    def __init__(
        self,
        model: JanusModel,
        prompts: Prompts,
        *,
        name: str,
        roles: str | None = None,
        files: WeightFiles | None = None,
    ):
        highest_id = max(prompts.tokenizer.get_vocab(with_added_tokens=True).values())
        size = model.config.language.vocab_size
        if highest_id >= size:
            raise ConfigError(
                f"the tokenizer's id {highest_id} is beyond the model's vocabulary of {size}: "
                "tokenizer.json and config.json do not belong together"
            )
        self._model: JanusModel | None = model  # None: closed
        self.prompts = prompts
        self.name = name
        self.roles = roles
        self.thread = ModelThread()
        self.caches: weakref.WeakSet[ModelCache] = weakref.WeakSet()  # emptied by ``close``
        self._files = files
        self._loaded_tasks: set[Task] = set()  # tasks whose weights are all held
        self._held: set[str] = set()  # names of all weights that may be held

    @property
    def model(self) -> JanusModel:
        """The network.

        Raises:
            JanusError: the model is closed.
        """
        if self._model is None:
            raise JanusError(CLOSED)
        return self._model

    @property
    def low_memory(self) -> bool:
        """Whether only the weights of the current task are held."""
        return self._files is not None

    @property
    def config(self) -> JanusConfig:
        """The model's config."""
        return self.model.config

    @property
    def precision(self) -> dict[str, str]:
        """The dtype and, if quantized, the bits or the recipe, by their keys in image metadata."""
        fields = {"dtype": str(self.config.dtype)}
        quantization = self.config.quantization
        if quantization is None:
            return fields
        if quantization.recipe:
            return fields | {"recipe": quantization.recipe}
        return fields | {"bits": str(quantization.bits)}

    @property
    def load_options(self) -> dict[str, str]:
        """The precision and the requested roles, if any, by their keys in image metadata."""
        return self.precision | ({"roles": self.roles} if self.roles else {})

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, of the ``tokenizers`` library."""
        return self.prompts.tokenizer

    def load_weights_for(self, task: Task) -> None:
        """Load the weights that a task needs.

        In low-memory mode, first free the previous task's weights that this task does not need.
        """
        if task in self._loaded_tasks:
            return
        weights = self._weights_of(task)
        if self._files:  # low-memory mode
            if unneeded := self._held - set(weights):
                self._files.free(self.model, unneeded)
                self._held -= unneeded
            self._loaded_tasks.clear()
        self._held |= set(weights)  # even if reading them fails midway
        materialize(weights.values(), self.thread.check)
        self._loaded_tasks.add(task)

    def _weights_of(self, task: Task) -> dict[str, mx.array]:
        """Return the weights that a task needs, by name."""
        model = self.model
        collectors: dict[Task, Callable[[], dict[str, mx.array]]] = {
            "encode": model.encoding_arrays,
            "answer": model.answering_arrays,
            "draw": model.drawing_arrays,
            "decode": model.decoding_arrays,
            "tokenize": model.tokenizing_arrays,
        }
        return collectors[task]()

    def check_text_options(self, options: TextOptions) -> None:
        """Check those options of an answer that depend on the model.

        Raises:
            OptionError: ``logit_bias`` has an id beyond the vocabulary.
        """
        options.check_vocabulary(self.config.language.vocab_size)

    def answering_ids(self, turns: Sequence[Turn], system: str | None = None) -> list[int]:
        """Return the token ids of a conversation, up to where the model goes on.

        Args:
            turns: messages. If the last one is the assistant's, it is the beginning of the answer.
            system: system prompt; None: the model's own, "": none.

        Raises:
            PromptError: no turn is the user's, a question has no words and no images, a text is not
                Unicode, or the context has no room for an answer.
            OptionError: ``system`` is not text.
        """
        ids = self.prompts.answering(turns, system)
        context = self.config.language.max_position_embeddings
        if len(ids) >= context:
            raise ContextLengthError(
                f"the prompt is {len(ids)} tokens long, images included, and this model's maximum "
                f"context length is {context}: shorten it, or show fewer images"
            )
        return ids

    def encode(
        self, images: Sequence[np.ndarray], stopwatch: Stopwatch | None = None
    ) -> list[mx.array]:
        """Encode images, and return the evaluated features of each, (tokens, hidden).

        Args:
            images: the pixels of each image as preprocessed for the encoder, (H, W, 3).
            stopwatch: times the encoding, but not the loading of weights; None: no timing.
        """
        if not images:
            return []
        self.load_weights_for("encode")
        features = []
        with stopwatch or Stopwatch():
            for image in images:  # one at a time, because the encoder's activations are large
                self.thread.check()
                batch = mx.array(image)[None]  # (1, H, W, 3)
                encoded = self.model.understand(batch)[0]
                mx.eval(encoded)
                features.append(encoded)
        return features

    def close(self) -> None:
        """Free the model's memory and end its thread, after a running step has ended.

        Later calls that need the model raise ``JanusError``; a second ``close`` does nothing.
        Arrays of other models and of the program stay valid.
        """
        self.thread.close()
        if self._model is None:
            return
        self._model = None
        self._loaded_tasks.clear()
        self._held.clear()
        for cache in list(self.caches):
            cache.clear()
        gc.collect()  # parts of a network refer to each other, so only the collector frees them
        if not is_forked():  # else MLX would wait for threads that this process lacks
            mx.clear_cache()
