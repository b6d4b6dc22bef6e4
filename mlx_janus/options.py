"""What the commands share: option decorators, number types, how errors and interrupts end a command, progress bars.

The answer goes to stdout, everything else to stderr. Exit codes: 0 done, 1 what only trying shows to be wrong, 2 what
the command line alone shows to be wrong, 130 after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from . import __version__
from .errors import JanusError

if TYPE_CHECKING:
    from .pipeline import JanusPipeline

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

MAX_SEED = 2**63 - 1


class FiniteRange(click.FloatRange):
    """A range that "nan" is not in."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class _Ending:
    """Turns the library's errors into one line and an exit code, and Ctrl-C into 130; for commands and groups."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)  # type: ignore[misc]
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, _terminated)
        try:
            code = super().main(*args, standalone_mode=False, **extra)  # type: ignore[misc]
            sys.stdout.flush()
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except JanusError as error:
            fail(str(error), 1)
        except (KeyboardInterrupt, click.Abort):
            fail("stopped", 130)
        except BrokenPipeError:  # the reader of our output left, as `| head` does
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except MemoryError:
            fail("the memory is used up: close other programs, or pass --bits 4", 1)
        sys.exit(code if isinstance(code, int) else 0)


class Command(_Ending, click.Command):
    """A command that ends as the module says."""


class Group(_Ending, click.Group):
    """A group that ends as the module says."""


def _terminated(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # runs what cleans up


def fail(message: str, code: int) -> None:
    """One line on stderr, and the end."""
    click.echo(f"Error: {' '.join(message.split())}" if code != 130 else f"\n{message}", err=True)
    sys.exit(code)


def say(message: str) -> None:
    """A line for the person, beside the answer."""
    click.echo(message, err=True)


def stack(*decorators: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """Several decorators as one, the first outermost."""

    def apply(function: Decorated) -> Decorated:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


version_option = click.version_option(__version__, "-V", "--version", message="mlx_janus %(version)s")

model_options = stack(
    click.option(
        "-m",
        "--model",
        metavar="MODEL",
        help="Converted folder, PyTorch model folder, or Hub id such as deepseek-ai/Janus-Pro-1B; PyTorch models are "
        "converted once, into a cache.",
    ),
    click.option("--bits", type=click.Choice(["4", "8"]), help="Quantize the language model to this many bits."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Type to compute in.  [default: the model's own; float32 on a CPU]",
    ),
    click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub."),
)

sampling_options = stack(
    click.option(
        "--temperature",
        type=FiniteRange(0, 1000),
        metavar="T",
        help="How much chance there is; 0: none.  [default: 0 to answer, the model's own to draw]",
    ),
    click.option(
        "--top-p",
        type=FiniteRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        metavar="P",
        help="Choose among the likeliest tokens that hold this much probability.",
    ),
    click.option("--seed", type=click.IntRange(0, MAX_SEED), metavar="S", help="Repeat a result.  [default: random]"),
)

answering_options = stack(
    click.option("--max-tokens", type=click.IntRange(1, 1 << 20), metavar="N", help="Longest answer.  [default: 512]"),
    click.option(
        "--system", metavar="TEXT", help='System prompt of answers; "" for none.  [default: the model\'s own]'
    ),
)


def load_model(model: str | None, bits: str | None, dtype: str | None, revision: str | None) -> JanusPipeline:
    """``mlx_janus.load`` with a progress bar while a model is converted."""
    from .pipeline import load

    with byte_progress() as progress:
        return load(model, bits=int(bits) if bits else None, dtype=dtype, revision=revision, progress=progress)


@contextlib.contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar in bytes on stderr, one a stage, that appears with the first report."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(
                total=total, desc=stage, unit="B", unit_scale=True, file=sys.stderr, mininterval=bar_interval()
            )
        bars[stage].update(done - bars[stage].n)

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


def bar_interval() -> float:
    """Seconds between two redrawings: often on a terminal, rarely in a log."""
    return 0.2 if sys.stderr.isatty() else 10.0


def check_output(path: Path) -> None:
    """Refuse an output that cannot be written before minutes are spent on it.

    Raises:
        OutputError: with the reason.
    """
    from .errors import OutputError

    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{folder} is no folder: make it first, or name another with --output")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} cannot be written to: name another folder with --output")
