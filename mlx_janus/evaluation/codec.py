"""The image codec on scenes: images compared with their reconstructions, by pixels and by judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..worlds import judge, shapes
from .sizes import Progress, Sizes

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline


def measure_codec(
    janus: JanusPipeline,
    sizes: Sizes,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """Measure the image codec on random scenes.

    Returns:
        "psnr": mean PSNR of the reconstructions, in dB.
        "judge_right_before": share of original images that the judge reads right.
        "judge_right_after": share of reconstructions that the judge reads right.
    """
    import mlx.core as mx

    random = np.random.default_rng([seed, 14])  # 14: this part's own random numbers
    right_before = 0
    right_after = 0
    psnr = []
    n = sizes.reconstructed
    for i in range(n):
        scene = shapes.sample_scene(random, split="any")
        pixels = shapes.pixels(scene)
        batch = mx.array(pixels)[None]
        tokens = janus.model.encode_image_tokens(batch)
        output = janus.model.decode_image_tokens(tokens)
        decoded = np.array(output[0]).clip(-1, 1)
        errors = decoded - pixels
        mean_squared_error = float((errors**2).mean())
        divisor = max(mean_squared_error, 1e-10)  # never 0
        # PSNR divides the square of the values' range by the mean squared error. The values range
        # from -1 to 1, so the square is 4.
        psnr.append(10 * np.log10(4 / divisor))
        values = (decoded + 1) * 127.5
        reconstruction = values.round().astype(np.uint8)
        right_before += is_read_right(scene, shapes.render(scene))
        right_after += is_read_right(scene, reconstruction)
        progress("codec", i + 1, n)
    return {
        "psnr": float(np.mean(psnr)),
        "judge_right_before": right_before / n,
        "judge_right_after": right_after / n,
    }


def is_read_right(scene: shapes.Scene, image: Any) -> bool:
    """Return whether the judge finds exactly the things of a scene, each near its true place.

    Args:
        scene: the scene.
        image: an image of the scene, as ``judge.read`` takes it.
    """
    found = judge.read(image)
    names_found = Counter(detection.name for detection in found)
    names = Counter(thing.name for thing in scene.things)
    if names_found != names:
        return False
    too_far = shapes.SMALLEST / 2  # pixels; half the size of the smallest thing
    return all(_distance_to_nearest(thing, found) < too_far for thing in scene.things)


def _distance_to_nearest(thing: shapes.Thing, found: Sequence[judge.Detection]) -> float:
    """Return the distance in pixels from a thing to the nearest found object of the same name.

    At least one found object must have this name.
    """
    distances = []
    for detection in found:
        if detection.name == thing.name:
            distance = np.hypot(detection.x - thing.x, detection.y - thing.y)
            distances.append(float(distance))
    return min(distances)
