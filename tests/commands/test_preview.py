"""Previews in the terminal: where, how often, and at what cost (test_chat.py looks at them)."""

from __future__ import annotations

import io
import sys
import time

import pytest
from PIL import Image

from mlx_janus.commands.preview import SHARE, TerminalPreview, can_show
from mlx_janus.inference.results import ImageStep


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({}, False),
    ],
)
def test_shown_on_terminals_with_colours(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], shown: bool
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", _Terminal())
    assert can_show() is shown
    monkeypatch.setattr(_Terminal, "encoding", "ascii")
    assert not can_show()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not can_show()


@pytest.mark.filterwarnings("ignore:Image.Image.getdata:DeprecationWarning")  # textual-image's
def test_a_picture_that_is_cut_by_ctrl_c_leaves_no_open_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Cut(io.StringIO):
        def write(self, text: str) -> int:
            if len(text) > 100:
                super().write("\x1bP0;0;0q#1;2;9")  # as far as a sixel came
                raise KeyboardInterrupt
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Cut())
    preview = TerminalPreview()
    with pytest.raises(KeyboardInterrupt):
        preview.show_step(ImageStep(1, 8, (), lambda: [Image.new("RGB", (64, 64), "red")]))
    assert sys.stdout.getvalue().endswith("#1;2;9\x1b\\\x1b[0m")  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:Image.Image.getdata:DeprecationWarning")  # textual-image's
@pytest.mark.parametrize("cost", [0.1, 1.0, 7.0])
def test_looking_takes_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    preview, looks = TerminalPreview(), []

    def look() -> list[Image.Image]:
        nonlocal now
        now += cost
        return [Image.new("RGB", (64, 64), "red")]

    for index in range(1, 577):
        now += 0.5
        step = ImageStep(index, 576, (), look)
        if preview.is_due(step):
            preview.show_step(step)
            looks.append(index)
    assert looks[0] == 72  # not before an eighth is there
    assert len(looks) > 1
    assert cost * len(looks) <= SHARE * now
