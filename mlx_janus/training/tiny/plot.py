"""The plot of a training log."""

from __future__ import annotations

from pathlib import Path

from ..loop import read_log

_IMAGE_LOSS = ("image_loss", "loss of pictures, nats a token")
# Stage, key in the log's lines, title of the curve.
_CURVES = (
    ("codec", "psnr", "reconstruction, dB"),
    ("merged", "psnr", "reconstruction, dB"),
    ("encoder", "shapes_right", "patches whose shape is right"),
    ("drawing", *_IMAGE_LOSS),
    ("joint", *_IMAGE_LOSS),
    ("joint", "tracking_loss", "loss of the tracking head, nats"),
    ("joint", "text_loss", "loss of answers, nats a token"),
    ("places", *_IMAGE_LOSS),
    ("places", "text_loss", "loss of answers, nats a token"),
    ("places", "placing_loss", "loss of the placing head"),
)


def plot_log(log: Path, output: Path) -> None:
    """Plot the ten curves of ``_CURVES`` in two rows, each over the steps of its stage.

    Args:
        log: file of the log.
        output: file for the plot; its suffix sets the format.
    """
    from matplotlib.figure import Figure

    lines = read_log(log)
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    for axes, (stage, key, title) in zip(figure.subplots(2, 5).flat, _CURVES, strict=True):
        points = [line for line in lines if line["stage"] == stage and key in line]
        steps = [line["step"] for line in points]
        values = [line[key] for line in points]
        if points:  # the axes of a stage that has not begun stay empty
            axes.plot(steps, values, linewidth=1)
        axes.set_title(f"{stage}: {title}", fontsize=9)
        axes.set_xlabel("steps", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.savefig(output, dpi=100)
