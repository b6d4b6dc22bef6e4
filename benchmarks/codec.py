"""What the image codec keeps: ``python benchmarks/codec.py``.

The script encodes and decodes images whose contents are known, and prints three tables:

- named scenes, all held out of training but those of "any": the share that the judge reads right,
  before and after, and the PSNR;
- colours that no word names: the difference in CIEDE2000 (about 1 is just visible) between the
  colour of a figure, or of a background, and its median colour afterwards;
- outlines: intersection over union (IoU) of a figure before and after, also of outlines that
  training never shows.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus

# isort: split
import mlx.core as mx
from scipy import ndimage
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import peak_signal_noise_ratio

from mlx_janus.evaluation.codec import is_read_right
from mlx_janus.models.vq import VQModel
from mlx_janus.training.loop import part_of
from mlx_janus.training.tiny.recipe import CODEC
from mlx_janus.worlds import open_scenes, shapes
from mlx_janus.worlds.open_scenes import RGB, Figure, OpenScene

SPLITS: tuple[shapes.Split, ...] = ("any", "scenes", "pairs")
UNNAMED: Mapping[str, RGB] = {
    "pink": (255, 150, 190),
    "brown": (120, 72, 32),
    "cyan": (0, 200, 220),
    "grey": (128, 128, 128),
    "black": (16, 16, 16),
    "magenta": (220, 20, 200),
    "teal": (0, 128, 128),
    "olive": (128, 128, 0),
    "navy": (10, 20, 110),
    "lime": (170, 250, 40),
    "beige": (210, 180, 140),
    "sky blue": (130, 200, 250),
}
_SEED = 2024
_BATCH = 16  # images coded at once
_PER_COLOUR = 24  # figures of each unnamed colour
_RADII = (5.0, 14.0)  # pixels, of these figures

Recode = Callable[[np.ndarray], np.ndarray]
"""Encode and decode images, (B, S, S, 3) of bytes -> the same."""


class FigureScore(NamedTuple):
    """How a figure came back."""

    name: str
    colour_difference: float  # CIEDE2000
    iou: float


@click.command(help=__doc__)
@click.option("-m", "--model", default="tiny", show_default=True, help="Model whose codec to use.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Use the codec of a training checkpoint (codec or merged) instead.",
)
@click.option("--images", default=2000, show_default=True, help="Images of each split.")
def main(model: str, checkpoint: Path | None, images: int) -> None:
    """Print the tables."""
    recode = _codec_of_checkpoint(checkpoint) if checkpoint else _codec_of_model(model)
    print(f"| {images} scenes | judge, before | judge, after | PSNR |\n|---|---|---|---|")
    for split in SPLITS:
        before, after, psnr = _measure_named(recode, split, images)
        print(f"| {split} | {before:.1%} | {after:.1%} | {psnr:.1f} dB |", flush=True)

    random = np.random.default_rng([_SEED, 1])
    scenes = [open_scenes.sample_open_scene(random) for _ in range(images // 4)]
    unseen = [
        open_scenes.sample_open_scene(random, names=open_scenes.UNSEEN) for _ in range(images // 8)
    ]
    scores, backgrounds = _measure_open(recode, scenes)
    unseen_scores, _ = _measure_open(recode, unseen)
    unnamed_scores, _ = _measure_open(recode, _unnamed_scenes(random))

    print("\n| colours | CIEDE2000, mean | 90 % are below |\n|---|---|---|")
    _print_colours("figures of any colour", [score.colour_difference for score in scores])
    _print_colours("backgrounds of any colour", backgrounds)
    _print_colours("unnamed", [score.colour_difference for score in unnamed_scores])
    for i, name in enumerate(UNNAMED):
        of_colour = unnamed_scores[i * _PER_COLOUR : (i + 1) * _PER_COLOUR]
        _print_colours(name, [score.colour_difference for score in of_colour])

    print("\n| outlines | IoU, mean | 95 % are above |\n|---|---|---|")
    by_name = defaultdict(list)
    for score in [*scores, *unseen_scores]:
        by_name[score.name].append(score.iou)
    for name, ious in sorted(by_name.items()):
        label = f"{name} (never shown)" if name in open_scenes.UNSEEN else name
        print(f"| {label} | {np.mean(ious):.2f} | {np.quantile(ious, 0.05):.2f} |")


def _codec_of_model(source: str) -> Recode:
    """Return the codec of a model that ``load`` takes."""
    model = mlx_janus.load(source).model
    return _recode_with(model.encode_image_tokens, model.decode_image_tokens)


def _codec_of_checkpoint(path: Path) -> Recode:
    """Return the codec of a stage's checkpoint."""
    weights = part_of(mx.load(str(path)), "model.")
    codec = VQModel(CODEC)
    codec.load_weights(list(weights.items()), strict=True)
    return _recode_with(codec.encode, codec.decode_code)


def _recode_with(encode: Callable[..., Any], decode: Callable[..., Any]) -> Recode:
    """Return a function that encodes and decodes images of bytes, in batches."""

    def recode(images: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(images), _BATCH):
            values = images[start : start + _BATCH].astype(np.float32) / 127.5 - 1
            decoded = np.array(decode(encode(mx.array(values)))).clip(-1, 1)
            parts.append(((decoded + 1) * 127.5).round().astype(np.uint8))
        return np.concatenate(parts)

    return recode


def _measure_named(recode: Recode, split: shapes.Split, count: int) -> tuple[float, float, float]:
    """Return the shares that the judge reads right before and after, and the mean PSNR."""
    random = np.random.default_rng([_SEED, 2, SPLITS.index(split)])
    scenes = [shapes.sample_scene(random, split=split) for _ in range(count)]
    images = np.stack([np.asarray(shapes.render(scene)) for scene in scenes])
    decoded = recode(images)
    pairs = list(zip(scenes, images, decoded, strict=True))
    before = np.mean([is_read_right(scene, image) for scene, image, _ in pairs])
    after = np.mean([is_read_right(scene, output) for scene, _, output in pairs])
    with np.errstate(divide="ignore"):  # an image that comes back exactly has an infinite PSNR
        psnr = [peak_signal_noise_ratio(image, output) for _, image, output in pairs]
    return float(before), float(after), float(np.minimum(psnr, 100).mean())


def _unnamed_scenes(random: np.random.Generator) -> list[OpenScene]:
    """Make scenes of one figure, ``_PER_COLOUR`` for each unnamed colour, on named backgrounds."""
    backgrounds = list(shapes.BACKGROUNDS.values())
    scenes = []
    for rgb in UNNAMED.values():
        for i in range(_PER_COLOUR):
            radius = random.uniform(*_RADII)
            x, y = random.uniform(radius + 1, shapes.SIDE - radius - 1, 2)
            name = ("circle", "square", "heart", "star")[i % 4]
            figure = open_scenes.make_figure(random, name, rgb, (x, y, radius))
            background = backgrounds[int(random.integers(len(backgrounds)))]
            scenes.append(OpenScene((figure,), background))
    return scenes


def _measure_open(
    recode: Recode, scenes: Sequence[OpenScene]
) -> tuple[list[FigureScore], list[float]]:
    """Return the score of every figure, and every background's difference in CIEDE2000."""
    images = np.stack([np.asarray(open_scenes.render(scene)) for scene in scenes])
    decoded = recode(images).astype(float)
    figures = []
    backgrounds = []
    for scene, output in zip(scenes, decoded, strict=True):
        masks = [_mask(figure) for figure in scene.figures]
        covered = np.maximum.reduce(masks)
        plain = ndimage.binary_erosion(covered < 0.01, iterations=2)
        backgrounds.append(_colour_difference(scene.background, np.median(output[plain], axis=0)))
        for i, (figure, mask) in enumerate(zip(scene.figures, masks, strict=True)):
            others = [other for j, other in enumerate(masks) if j != i]
            figures.append(_score_figure(figure, mask, others, scene.background, output))
    return figures, backgrounds


def _score_figure(
    figure: Figure,
    mask: np.ndarray,
    others: Sequence[np.ndarray],
    background: RGB,
    output: np.ndarray,
) -> FigureScore:
    """Compare a figure with an image that should show it.

    Args:
        figure: the figure.
        mask: (S, S), the share of each pixel that it covers.
        others: the masks of the other figures.
        background: the background's colour.
        output: (S, S, 3), the decoded image, 0 to 255.
    """
    contrast = np.subtract(figure.rgb, background).astype(float)
    share = (output - background) @ contrast / (contrast @ contrast)
    near = ndimage.binary_dilation(mask > 0, iterations=3)
    for other in others:
        near &= other == 0
    seen = (share > 0.5) & near
    true = mask > 0.5
    union = (seen | true).sum()
    iou = (seen & true).sum() / union if union else 1.0
    rgb = np.median(output[_inner(mask)], axis=0)
    return FigureScore(figure.name, _colour_difference(figure.rgb, rgb), float(iou))


def _mask(figure: Figure) -> np.ndarray:
    """Return the share of each pixel that a figure covers: (S, S)."""
    white = Figure(figure.name, (255, 255, 255), figure.outline, figure.hole)
    image = open_scenes.render(OpenScene((white,), (0, 0, 0)))
    return np.asarray(image)[..., 0] / 255


def _inner(mask: np.ndarray) -> np.ndarray:
    """Return the pixels inside a figure: away from the edge where it is large enough."""
    inner = mask > 0.99 if (mask > 0.99).any() else mask == mask.max()
    for _ in range(2):
        smaller = ndimage.binary_erosion(inner)
        if smaller.sum() < 4:
            break
        inner = smaller
    return inner


def _colour_difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Return the difference of two colours (RGB, 0 to 255) in CIEDE2000."""
    labs = rgb2lab(np.array([a, b], dtype=float)[:, None] / 255)
    return float(deltaE_ciede2000(labs[0], labs[1])[0])


def _print_colours(label: str, differences: Sequence[float]) -> None:
    """Print a row of the table of colours."""
    print(f"| {label} | {np.mean(differences):.1f} | {np.quantile(differences, 0.9):.1f} |")


if __name__ == "__main__":
    main()
