"""Write docs/chat.svg, the terminal of a chat with Janus-Tiny: ``python docs/write_chat.py``.

The script runs the program on a pseudo-terminal and types at it; rich renders its screen. It needs
the extra "test".
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(__file__).with_name("chat.svg")
COLUMNS = 90
ROWS = 44
TYPED = (
    "/seed 3",
    "/draw a red circle above a blue square",
    "What is in the picture?",
    "What colour is the square?",
    "Is the circle left of the square?",
    "/stats",
)


def screen() -> pyte.Screen:
    """Run a chat on a pseudo-terminal, type ``TYPED``, and return the screen at the end."""
    shown = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(shown)
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TERM": "xterm-256color",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "PYTHONPATH": str(ROOT),
            "XDG_STATE_HOME": folder,
            "HOME": folder,
        }
        child = pexpect.spawn(
            sys.executable,
            ["-m", "mlx_janus.chat"],
            env=environment,
            encoding="utf-8",
            dimensions=(ROWS, COLUMNS),
            cwd=folder,
        )
        for line in (*TYPED, None):  # None: wait for the last answer, and type nothing
            _wait(child, stream, shown)
            if line is not None:
                child.send(f"{line}\r")
        child.close(force=True)
    return shown


def _wait(child: pexpect.spawn, stream: pyte.Stream, shown: pyte.Screen) -> None:
    """Show the program's output until it has ended, with the prompt on the last line.

    Args:
        child: the program.
        stream: draws the output on the screen.
        shown: the screen.

    Raises:
        TimeoutError: no prompt appeared in two minutes.
    """
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            stream.feed(child.read_nonblocking(100_000, timeout=1.0))
        except pexpect.TIMEOUT:
            lines = [line.rstrip() for line in shown.display if line.strip()]
            if lines and lines[-1] == ">":
                return
    raise TimeoutError(f"no prompt appeared: {[line for line in shown.display if line.strip()]}")


def drawn(shown: pyte.Screen) -> str:
    """Render the screen as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor")
    last = max(y for y in range(ROWS) if shown.display[y].strip())
    for y in range(last):  # the last line is the empty prompt
        text = Text()
        for x in range(COLUMNS):
            cell = shown.buffer[y][x]
            style = _colour(cell.fg)
            if background := _colour(cell.bg):
                style += f" on {background}"
            text.append(cell.data, style.strip())
        text.rstrip()
        console.print(text, no_wrap=True)
    return console.export_svg(title="python -m mlx_janus.chat")


def _colour(name: str) -> str:
    """Return a cell's colour for rich: "#" and the six hexadecimal digits; "": the default."""
    with contextlib.suppress(ValueError):
        if len(name) == 6 and int(name, 16) >= 0:
            return f"#{name}"
    return ""


if __name__ == "__main__":
    TARGET.write_text(drawn(screen()), encoding="utf-8")
