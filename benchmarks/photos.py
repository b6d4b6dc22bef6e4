"""Copy photographs from scikit-image's wheel: ``python benchmarks/photos.py FOLDER``.

Nothing is downloaded. The photographs are in the wheel itself (checked with 0.25 and 0.26; pooch is
not needed), and scikit-image states their licences in ``skimage/data/_fetchers.py``:

- ``astronaut`` 512 x 512, Eileen Collins. NASA; "no known copyright restrictions, released into the
  public domain".
- ``coffee`` 600 x 400. "No copyright restrictions. CC0 by the photographer (Rachel Michetti)".
- ``chelsea`` 451 x 300, a cat. "No copyright restrictions. CC0 by the photographer (Stefan van der
  Walt)".
- ``rocket`` 640 x 427, launch of DSCOVR. SpaceX; "released in the public domain".
- ``camera`` 512 x 512, gray. "No copyright restrictions. CC0 by the photographer (Lav Varshney)".
- ``hubble_deep_field`` 1000 x 872. NASA; "may be freely used in the public domain".
- ``retina`` 1411 x 1411. "Creative Commons CC0 1.0 Universal Public Domain Dedication".
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click
from PIL import Image

FILES = {
    "astronaut": "astronaut.png",
    "coffee": "coffee.png",
    "chelsea": "chelsea.png",
    "rocket": "rocket.jpg",
    "camera": "camera.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "retina": "retina.jpg",
}


def photograph_files() -> dict[str, Path]:
    """Find the path of each photograph in the wheel.

    scikit-image itself is not imported, because that takes seconds.

    Raises:
        FileNotFoundError: scikit-image is not installed, or its wheel lacks one of them.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the photographs are scikit-image's, which is not installed: pip install scikit-image"
        )
    data = Path(spec.origin).parent / "data"
    paths = {name: data / file for name, file in FILES.items()}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing from this scikit-image: pip install 'scikit-image>=0.25'"
            )
    return paths


def photographs() -> dict[str, Image.Image]:
    """Open all photographs as RGB images, by name.

    Raises:
        FileNotFoundError: scikit-image is not installed, or its wheel lacks one of them.
    """
    images = {}
    for name, path in photograph_files().items():
        with Image.open(path) as image:
            images[name] = image.convert("RGB")
    return images


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Copy the photographs into FOLDER, byte for byte (PNG and JPEG); existing files are kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in photograph_files().values():
            copy = folder / path.name
            if not copy.exists():
                copy.write_bytes(path.read_bytes())
            click.echo(copy)
    except OSError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
