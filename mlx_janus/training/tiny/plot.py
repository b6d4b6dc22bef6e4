"""The plot of a training log."""

from __future__ import annotations

from pathlib import Path

from ..loop import read_log

_IMAGE_LOSS = ("image_loss", "loss of pictures, nats a token")
_CURVES = (  # stage, key in the log, title
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
    """Plot each stage's curves over its steps.

    Args:
        log: the log's file.
        output: the plot's file; its suffix tells the format.
    """
    from matplotlib.figure import Figure

    lines = read_log(log)
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    for axes, (stage, key, title) in zip(figure.subplots(2, 5).flat, _CURVES, strict=True):
        # The axes of a stage that has not begun stay empty, as the log has no lines of it.
        shown = [line for line in lines if line["stage"] == stage and key in line]
        steps = [line["step"] for line in shown]
        values = [line[key] for line in shown]
        if shown:
            axes.plot(steps, values, linewidth=1)
        axes.set_title(f"{stage}: {title}", fontsize=9)
        axes.set_xlabel("steps", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.savefig(output, dpi=100)
