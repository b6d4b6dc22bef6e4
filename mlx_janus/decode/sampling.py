"""Guidance, noise and sampling: pure functions of logits and keys.

Gumbel-max trick: a sample from softmax(z / T) is argmax(z / T + g), where g is Gumbel noise. The
noise here is a pure function of an image's seed and a position, so an image does not depend on the
other images of its batch.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.sample_utils import apply_top_p

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


def scale_logits(logits: mx.array, temperature: float, top_p: float) -> mx.array:
    """Apply a temperature and nucleus sampling to (..., V) logits.

    Nucleus sampling: tokens outside the smallest set with probability ``top_p`` get minus infinity.

    Args:
        logits: (..., V).
        temperature: above 0.
        top_p: probability of the tokens to keep; 1: keep all.

    Returns:
        (..., V) scaled logits if ``top_p`` is 1, else log-probabilities.
    """
    scaled = logits * (1.0 / temperature)
    if top_p >= 1.0:
        return scaled
    log_probabilities = scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)
    return apply_top_p(log_probabilities, top_p)


def choose(logits: mx.array, keys: mx.array, temperature: float, top_p: float = 1.0) -> mx.array:
    """Choose a token for each row of V logits: the most likely at temperature 0, else a sample.

    Args:
        logits: (..., V), float32.
        keys: (..., 2), a random key for each row.
        temperature: 0 or more.
        top_p: probability of the smallest set of tokens to sample from (nucleus sampling).

    Returns:
        (...) token ids.
    """
    if temperature < _ARGMAX_BELOW:
        return mx.argmax(logits, axis=-1)
    scaled = scale_logits(logits, temperature, top_p)
    noise = gumbel_noise(keys, logits.shape[-1])
    return mx.argmax(scaled + noise, axis=-1)  # Gumbel-max trick: a sample from softmax(scaled)
