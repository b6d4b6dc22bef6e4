"""Guidance, noise and sampling: pure functions of logits and keys.

Gumbel-max trick: a sample from softmax(z / T) is argmax(z / T + g), where g is Gumbel noise. The
noise here is a pure function of an image's seed and a position, so an image does not depend on the
other images of its batch.
"""

from __future__ import annotations

from .. import open_files  # noqa: F401  before mlx_lm

# isort: split
import secrets
from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from ..limits import MAX_SEED, RANDOM_SEED, check_int

_ARGMAX_BELOW = 1e-30  # temperatures T below this take the argmax, because 1 / T would overflow


def random_seed() -> int:
    """Return a random seed of 32 bits."""
    return secrets.randbelow(2**32)


def pick_seed(seed: int | None) -> int:
    """Return the given seed, or a random one for None and for -1.

    Raises:
        OptionError: the seed is not an integer, or out of range.
    """
    if seed is None:
        return random_seed()
    number = check_int("seed", seed, RANDOM_SEED, MAX_SEED)
    return random_seed() if number == RANDOM_SEED else number


def guide(conditional: mx.array, unconditional: mx.array, weight: float | mx.array) -> mx.array:
    """Apply classifier-free guidance: unconditional + weight * (conditional - unconditional).

    Args:
        conditional: (n, ..., V) logits given the prompt.
        unconditional: (n, ..., V) logits without the prompt.
        weight: a number, or an array that broadcasts to the shape of the logits. 1 gives the
            conditional logits, 0 the unconditional ones.

    Returns:
        (n, ..., V) guided logits.
    """
    return unconditional + weight * (conditional - unconditional)


def position_keys(seeds: Sequence[int], positions: int) -> mx.array:
    """Return one random key for every image and position: (n, positions, 2).

    The keys depend on the number of positions, so always pass that of an entire image.

    Args:
        seeds: the seeds of n images.
        positions: number of tokens of an image.
    """
    keys = []
    for seed in seeds:
        key = mx.random.key(seed)
        keys.append(mx.random.split(key, positions))
    return mx.stack(keys)


def gumbel_noise(keys: mx.array, size: int) -> mx.array:
    """Return ``size`` samples of Gumbel noise for each random key: (..., 2) -> (..., size).

    The noise of a key does not depend on the other keys.
    """

    def noise_of(key: mx.array) -> mx.array:
        return mx.random.gumbel((size,), key=key)

    flat = keys.reshape(-1, 2)
    noise = mx.vmap(noise_of)(flat)
    return noise.reshape(*keys.shape[:-1], size)


def scale_logits(
    logits: mx.array, temperature: float, top_p: float, top_k: int = 0, min_p: float = 0.0
) -> mx.array:
    """Apply a temperature, then min-p, top-k and nucleus sampling, to (..., V) logits.

    A filter gives minus infinity to the tokens that it excludes. The order of the filters is that
    of vLLM.

    Args:
        logits: (..., V).
        temperature: above 0.
        top_p: nucleus sampling: keep the smallest set of tokens with this probability, of those
            that the other filters keep; 1: keep all.
        top_k: keep this number of the likeliest tokens; 0, or V and more: keep all.
        min_p: keep the tokens that are at least this share as likely as the likeliest; 0: keep all.

    Returns:
        (..., V) scaled logits if there is no filter, else log-probabilities before the filters.
    """
    scaled = logits * (1.0 / temperature)
    filters_by_rank = 0 < top_k < logits.shape[-1]
    if top_p >= 1.0 and not filters_by_rank and not min_p:
        return scaled
    kept = scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)
    if min_p:
        kept = apply_min_p(kept, min_p)
    if filters_by_rank:
        kept = apply_top_k(kept, top_k)
    if top_p < 1.0:
        kept = apply_top_p(kept, top_p)
    return kept


def choose(
    logits: mx.array,
    keys: mx.array,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> mx.array:
    """Choose a token for each row of V logits: the most likely at temperature 0, else a sample.

    Args:
        logits: (..., V), float32.
        keys: (..., 2), a random key for each row.
        temperature: 0 or more.
        top_p: as for ``scale_logits``; 0: the most likely token, as at temperature 0.
        top_k: as for ``scale_logits``; 1: the most likely token.
        min_p: as for ``scale_logits``.

    Returns:
        (...) token ids.
    """
    if temperature < _ARGMAX_BELOW or top_p == 0 or top_k == 1:
        return mx.argmax(logits, axis=-1)
    scaled = scale_logits(logits, temperature, top_p, top_k, min_p)
    noise = gumbel_noise(keys, logits.shape[-1])
    return mx.argmax(scaled + noise, axis=-1)  # Gumbel-max trick: a sample from softmax(scaled)
