"""A loaded model: its weights, its prompts and its thread, below the public API."""

from __future__ import annotations

import gc
import re
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import mlx.core as mx
import numpy as np

from ..decode.constraint import GrammarCompiler, Vocabulary
from ..errors import ConfigError, ContextLengthError, JanusError, OptionError
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
"""All tasks except "tokenize", which only changes of images need."""


_TRAINED_FOR_EDITING = re.compile(r"janus[-_. ]?4o(?![a-z0-9])", re.IGNORECASE)
"""Names of the models that were trained to change images: Janus-4o-7B and its conversions."""
_TRAINED_FOR_PLANS = re.compile(r"(?<![a-z0-9])t2i[-_. ]?r1(?![a-z0-9])", re.IGNORECASE)
"""Names of the models that were trained to write plans: T2I-R1 and its conversions."""


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
        source: the name of the model that was converted, as its files record it.

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
        source: str = "",
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
        self._source = source
        self.grammars = GrammarCompiler(self._vocabulary)
        self.thread = ModelThread()
        self.caches: weakref.WeakSet[ModelCache] = weakref.WeakSet()  # emptied by ``close``
        self._files = files
        self._loaded_tasks: set[Task] = set()  # tasks whose weights are all held
        # The names of all weights that may be in memory.
        self._held: set[str] = set()

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
    def trained_for_editing(self) -> bool:
        """Whether the model was trained to change images, as Janus-4o was.

        The files of Janus-4o look like those of a Janus-Pro, so the name decides: the model's own,
        or the name of the model that it was converted from.
        """
        return any(_TRAINED_FOR_EDITING.search(name) for name in (self.name, self._source))

    @property
    def trained_for_plans(self) -> bool:
        """Whether the model was trained to write a plan before it draws, as T2I-R1 was.

        The files of T2I-R1 look like those of a Janus-Pro, so the name of the model that was
        converted decides.
        """
        return _TRAINED_FOR_PLANS.search(self._source) is not None

    @property
    def drawing_prompts(self) -> Prompts:
        """The templates of prompts for images.

        T2I-R1 was trained to draw with the roles User and Assistant, although its files have those
        of Janus-Pro. Requested roles take precedence.
        """
        if self.trained_for_plans and not self.roles:
            return self.prompts.with_roles("plain")
        return self.prompts

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

    def _vocabulary(self) -> Vocabulary:
        """Return the tokens in llguidance's form."""
        return Vocabulary(
            self.config.language.vocab_size,
            self.prompts.spelling,
            self.prompts.encode,
            self.prompts.special.bos,
            self.prompts.end_ids,
        )

    def check_text_options(self, options: TextOptions, turns: Sequence[Turn] = ()) -> None:
        """Check those options of an answer that depend on the model or on the conversation.

        Args:
            options: the options.
            turns: messages, as for ``answering_ids``.

        Raises:
            OptionError: ``logit_bias`` has an id beyond the vocabulary. Or the grammar is refused,
                needs a package that is not installed, or is given although ``turns`` end with the
                beginning of the answer.
        """
        options.check_vocabulary(self.config.language.vocab_size)
        grammar = options.grammar
        if grammar is None:
            return
        if turns and turns[-1].role == "assistant":
            problem = f"{grammar.subject} does not go with the beginning of an answer"
            raise OptionError(f"{problem}: end the conversation with a question")
        self.grammars.check(grammar)

    def answering_ids(self, turns: Sequence[Turn], system: str | None = None) -> list[int]:
        """Return the token ids of a conversation; the model continues after the last id.

        Args:
            turns: messages. If the last one is the assistant's, it is the beginning of the answer.
            system: system prompt; None: the model's own, "": none.

        Raises:
            PromptError: no turn is the user's, a question has no words and no images, a text is not
                Unicode, or the context has no room for an answer.
            OptionError: ``system`` is not text.
        """
        return self._within_context(self.prompts.answering(turns, system))

    def plain_ids(self, text: str) -> list[int]:
        """Return the token ids of a text that the model continues, without a template.

        Raises:
            PromptError: the text is not Unicode, or the context has no room for an answer.
        """
        return self._within_context(self.prompts.plain(text))

    def _within_context(self, ids: list[int]) -> list[int]:
        """Return the ids of a prompt.

        Raises:
            ContextLengthError: the context has no room for an answer.
        """
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

    def encode_in_parts(self, pixels: np.ndarray) -> Generator[None, None, mx.array]:
        """Encode one image in short parts; return the same features as ``encode`` does for it.

        Args:
            pixels: the pixels as preprocessed for the encoder, (H, W, 3).

        Yields:
            None after each part, such as a block of the encoder.
        """
        self.load_weights_for("encode")
        batch = mx.array(pixels)[None]  # (1, H, W, 3)
        for encoded in self.model.understand_in_parts(batch):
            mx.eval(encoded)
            yield
        return encoded[0]

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
