"""Janus-Tiny's tokenizer: byte-level BPE over the shapes world, and DeepSeek's control tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ...config import PromptConfig
from ...worlds import language, question_forms, shapes

_VOCABULARY_SIZE = 600  # entries at most, without control tokens: 256 bytes, and merges
_SCENES = 4000  # scenes whose texts train the tokenizer
_SYSTEM_SHARE = 0.1  # share of scenes that also give a system prompt
_SHARES = {
    "existence": 0.27,
    "colour": 0.11,
    "shape": 0.11,
    "number": 0.16,
    "position": 0.16,
    "content": 0.08,
    "description": 0.11,
}
"""Shares of question topics for the tokenizer only.

The training stages have their own, so that a change to a stage keeps the token ids
(docs/lab-notes.md).
"""


def train_tokenizer(config: PromptConfig, seed: int) -> Tokenizer:
    """Train a tokenizer for ``Prompts``. The same seed gives the same tokenizer.

    Args:
        config: the control tokens, and the separator between messages.
        seed: seed of the training texts.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(config, seed), trainer)
    controls = (
        config.bos,
        config.eos,
        config.pad,
        config.image,
        config.image_start,
        config.image_end,
        config.user,
        config.assistant,
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in controls]
    )
    return tokenizer


def _texts(config: PromptConfig, seed: int) -> Iterator[str]:
    """Yield captions, questions and answers, each with the characters next to it in a prompt."""
    random = np.random.default_rng([seed, 4])  # 4: random numbers of these texts only
    for _ in range(_SCENES):
        if random.random() < _SYSTEM_SHARE:
            yield f"{language.choose(random, question_forms.SYSTEM_PROMPTS)}{config.separator}"
        scene = shapes.sample_scene(random)
        yield f": {language.caption(scene, random)}{config.separator}"
        plain = language.question(scene, random, shares=_SHARES)
        asked = question_forms.sample_form(plain, random)
        yield f"\n{asked.text}{config.separator}"
        yield f": {asked.answer}"
