"""Generate a sheet of images from several prompts: ``python benchmarks/contact_sheet.py OUTPUT``.

The default prompts are for Janus-Tiny. The sheet has the first images of each prompt, unselected.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus

# isort: split
from PIL import Image, ImageDraw, ImageFont

PROMPTS = (
    "a red circle above a blue square",
    "a purple circle",
    "an orange square",
    "two green triangles",
    "three stars",
    "a yellow star left of a green circle",
    "a blue star and an orange triangle",
    "four purple squares",
)
_SCALE = 2  # pixels of the sheet for a pixel of a small image
_GAP = 8  # pixels between images
_LINE = 16  # pixels of a line of text
_GREY = (110, 110, 110)


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("-m", "--model", help="A folder or Hub id.  [default: Janus-Tiny]")
@click.option("-p", "--prompt", "prompts", multiple=True, help="Prompt; may be repeated.")
@click.option(
    "-n", type=click.IntRange(1, 100), default=3, show_default=True, help="Images of each prompt."
)
@click.option(
    "--columns",
    type=click.IntRange(1, 10),
    default=2,
    show_default=True,
    help="Prompts in a row of the sheet.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(
    output: Path, model: str | None, prompts: tuple[str, ...], n: int, columns: int, seed: int
) -> None:
    """Write OUTPUT, a PNG with images of several prompts."""
    janus = mlx_janus.load(model)
    prompts = prompts or PROMPTS
    side = janus.config.image_size * (_SCALE if janus.config.image_size < 200 else 1)
    width = n * (side + _GAP) + 2 * _GAP
    height = side + _LINE + 2 * _GAP
    rows = -(-len(prompts) // columns)  # rounded up
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for i, prompt in enumerate(prompts):
        left = i % columns * width + _GAP
        top = i // columns * height + _GAP
        draw.text((left, top - 2), prompt, fill=_GREY, font=font)
        for j, drawn in enumerate(janus.generate_images(prompt, n=n, seed=seed)):
            place = (left + j * (side + _GAP), top + _LINE)
            sheet.paste(drawn.image.resize((side, side), Image.Resampling.NEAREST), place)
            draw.rectangle(
                (*place, place[0] + side - 1, place[1] + side - 1), outline=(220, 220, 220)
            )
    sheet.save(output)
    click.echo(str(output))


if __name__ == "__main__":
    main()
