"""The progress of a drawing: which images are shown in the terminal, and where."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from mlx_janus.commands.preview import TerminalPreview
from mlx_janus.commands.progress import follow_drawing
from mlx_janus.inference.results import GeneratedImage, ImageStep

COLOURS = ("red", "lime", "blue", "yellow", "aqua", "white")


def drawn(number: int) -> GeneratedImage:
    """A finished image of one colour, whose seed is its number."""
    image = Image.new("RGB", (64, 64), COLOURS[number])
    return GeneratedImage(image=image, tokens=None, seed=number, prompt="x", metadata={})


def steps(*groups: int) -> Iterator[ImageStep]:
    """The steps of several groups of images, with two tokens an image."""
    finished: list[Image.Image] = []
    index = 0
    for size in groups:
        for _ in range(2):
            index += 1
            seen = [*finished, *[Image.new("RGB", (64, 64), "gray")] * size]
            yield ImageStep(index, 2 * len(groups), (), lambda seen=seen: seen)
        for _ in range(size):
            image = drawn(len(finished))
            finished.append(image.image)
            yield ImageStep(index, 2 * len(groups), (image,), lambda: list(finished))


class Watcher(TerminalPreview):
    """Previews that are only recorded, each as the colours of its images."""

    def __init__(self, due: bool) -> None:
        super().__init__()
        self.due = due
        self.shown: list[list[Any]] = []

    def is_due(self, step: ImageStep) -> bool:
        return self.due

    def show(self, images: Any) -> None:
        self.shown.append([image.getpixel((0, 0)) for image in images])


def colour(name: str) -> Any:
    return Image.new("RGB", (1, 1), name).getpixel((0, 0))


@pytest.mark.filterwarnings("ignore:Image.Image.getdata:DeprecationWarning")  # textual-image's
def test_every_finished_image_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every group that memory allows, also where previews have used up their time."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    watcher = Watcher(due=False)
    follow_drawing(steps(2, 1, 3), 6, lambda _: None, watcher)
    assert watcher.shown == [[colour(name)] for name in COLOURS]


@pytest.mark.filterwarnings("ignore:Image.Image.getdata:DeprecationWarning")  # textual-image's
def test_unfinished_images_are_shown_without_those_of_earlier_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    watcher = Watcher(due=True)
    follow_drawing(steps(4, 2), 6, lambda _: None, watcher)
    grey = colour("gray")
    first = [[grey] * 4] * 2 + [[colour(name)] for name in COLOURS[:4]]
    second = [[grey] * 2] * 2 + [[colour(name)] for name in COLOURS[4:]]
    assert watcher.shown == first + second


@pytest.mark.filterwarnings("ignore:Image.Image.getdata:DeprecationWarning")  # textual-image's
def test_a_preview_leaves_the_lines_of_earlier_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unfinished image is replaced in its place, and the next image comes below the path."""
    pyte = pytest.importorskip("pyte")
    screen = pyte.Screen(80, 60)
    stream = pyte.Stream(screen)

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def write(self, text: str) -> int:
            stream.feed(text.replace("\n", "\r\n"))
            return len(text)

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(TerminalPreview, "is_due", lambda *_: True)
    follow_drawing(steps(2), 2, lambda image: print(f"{image.seed}.png"), TerminalPreview())
    lines = [line.strip() for line in screen.display]
    first, second = lines.index("0.png"), lines.index("1.png")
    assert second - first == first + 1  # an image and its path, twice
    assert not any(len(line) > 40 for line in lines[: second + 1])  # nothing of the wider preview
    assert all(len(set(line)) == 1 for line in lines[:first])
