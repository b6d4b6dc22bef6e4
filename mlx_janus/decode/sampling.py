"""Guidance, noise and choice: pure functions of logits and keys.

A draw from softmax(z / T) is argmax(z / T + g) with Gumbel noise g (the Gumbel-max trick). The noise here is a pure
function of a picture's seed and a position, so a picture does not depend on what is drawn beside it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.sample_utils import apply_top_p

from ..limits import MAX_SEED, check_int


def random_seed() -> int:
    """A seed to draw or answer with when none is given."""
    return secrets.randbelow(2**32)


def pick_seed(seed: int | None) -> int:
    """The seed given, or a random one.

    Raises:
        OptionError: no whole number in the range of seeds.
    """
    if seed is None:
        return random_seed()
    return check_int("seed", seed, 0, MAX_SEED)


def guide(conditional: mx.array, unconditional: mx.array, weight: float | mx.array) -> mx.array:
    """Classifier-free guidance: u + weight * (c - u).

    Args:
        conditional: (n, ..., V) logits that follow the prompt.
        unconditional: (n, ..., V) logits that do not.
        weight: one for all rows, or an array that broadcasts over them; 1 gives the conditional rows, 0 the others.

    Returns:
        (n, ..., V).
    """
    return unconditional + weight * (conditional - unconditional)


def position_keys(seeds: Sequence[int], positions: int) -> mx.array:
    """(n, positions, 2) random keys, one for every picture and position.

    A split into another number of positions gives other keys: pass the model's whole token count, always.
    """
    return mx.stack([mx.random.split(mx.random.key(seed), positions) for seed in seeds])


def gumbel_noise(keys: mx.array, size: int) -> mx.array:
    """(..., 2) keys -> (..., size) noise, each row as its key alone would give it."""
    noise = mx.vmap(lambda key: mx.random.gumbel((size,), key=key))(keys.reshape(-1, 2))
    return noise.reshape(*keys.shape[:-1], size)


def scale_logits(logits: mx.array, temperature: float, top_p: float) -> mx.array:
    """Log-probabilities at a temperature above 0, outside the nucleus of ``top_p`` minus infinity; (..., V)."""
    logits = logits * (1.0 / temperature)
    if top_p < 1.0:
        logits = apply_top_p(logits - mx.logsumexp(logits, axis=-1, keepdims=True), top_p)
    return logits


def choose(logits: mx.array, keys: mx.array, temperature: float, top_p: float = 1.0) -> mx.array:
    """One token a row: argmax at temperature 0, else a draw with the noise of the row's key.

    Args:
        logits: (..., V), float32.
        keys: (..., 2).

    Returns:
        (...).
    """
    if temperature < 1e-30:  # 1 / T would overflow
        return mx.argmax(logits, axis=-1)
    scaled = scale_logits(logits, temperature, top_p)
    return mx.argmax(scaled + gumbel_noise(keys, logits.shape[-1]), axis=-1)
