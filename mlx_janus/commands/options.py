"""What the commands share: option decorators, number types, how errors and interrupts end a command, progress bars.

The answer goes to stdout, everything else to stderr. Exit codes: 0 done, 1 what only trying shows to be wrong, 2 what
the command line alone shows to be wrong, 130 after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..config import BITS, DTYPES, RECIPES
from ..errors import JanusError
from ..limits import MAX_CFG_WEIGHT, MAX_SEED, MAX_TEMPERATURE, MAX_TOKENS
from ..version import __version__
from .wording import logging_in_flags, to_flags

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ..inference.results import GeneratedImage, ImageStep, TextResult
    from ..pipeline import JanusPipeline
    from .preview import TerminalPreview

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


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

    def __init__(self, *args: Any, context_settings: dict[str, Any] | None = None, **extra: Any):
        settings = {"help_option_names": ["-h", "--help"]} | (context_settings or {})
        super().__init__(*args, context_settings=settings, **extra)  # type: ignore[call-arg]

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)  # type: ignore[misc]
        _prepare_process()
        try:
            code = super().main(*args, standalone_mode=False, **extra)  # type: ignore[misc]
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):  # click has ended the line of the ^C
            say("stopped")
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output left, as `| head` does
            _drop_stdout()
            sys.exit(1)
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            if isinstance(error, OSError):
                _drop_stdout()
            say(f"Error: {message}")
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


class Command(_Ending, click.Command):
    """A command that ends as the module says."""


class Group(_Ending, click.Group):
    """A group that ends as the module says."""


def _prepare_process() -> None:
    """Have SIGTERM clean up, and what an output's encoding lacks shown as "?"; open what was closed.

    The next file would have the number of a closed stream: MLX takes 0 for a failure, and what a library prints would
    go into a file with 1 or 2.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _terminated(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # runs what cleans up


def import_mlx() -> None:
    """Import MLX, while Ctrl-C and SIGTERM wait: an exception amid its own setting up aborts the process.

    Blocking them would not do: another thread, of OpenBLAS say, would take them, and this one be interrupted all the
    same.
    """
    if "mlx.core" in sys.modules or threading.current_thread() is not threading.main_thread():
        return
    came: list[int] = []
    stops = (signal.SIGINT, signal.SIGTERM)
    before = {stop: signal.signal(stop, lambda number, _: came.append(number)) for stop in stops}
    try:
        import mlx.core  # noqa: F401
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
    for number in came:
        signal.raise_signal(number)


def _drop_stdout() -> None:
    """Python writes what is left in stdout's buffer as it ends: a second failure, if it could not be written before."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> str | None:
    """One line for what a person can do something about; None for a bug, whose traceback is wanted."""
    text = " ".join(str(error).split())
    if isinstance(error, JanusError):
        return to_flags(text)
    if isinstance(error, OSError):
        reason = error.strerror or text
        return f"{error.filename}: {reason}" if error.filename else reason
    mlx = type(error) is RuntimeError and text.startswith(("[", "Unable"))  # "[malloc] Unable to allocate 8 bytes."
    if isinstance(error, MemoryError) or (mlx and any(word in text for word in ("alloc", "Memory"))):
        return "the memory is used up: close other programs, or pass --bits 4"
    return f"MLX failed: {text}" if mlx else None


def say(message: str) -> None:
    """A line for the person, beside the answer."""
    click.echo(message, err=True)


def note(message: str) -> None:
    """A line for the person that --quiet leaves out."""
    if not _quiet():
        say(message)


def say_if_cut(result: TextResult) -> None:
    """A note under an answer that did not come to its end."""
    if result.finish_reason == "length":
        note(f"Cut after {len(result.tokens)} tokens, by --max-tokens or the model's context.")


def stack(*decorators: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """Several decorators as one, the first outermost."""

    def apply(function: Decorated) -> Decorated:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def bits_or_recipe(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A callback of --bits and --recipe, which say the same thing in two ways."""
    if value and any(ctx.params.get(name) for name in ("bits", "recipe") if name != param.name):
        raise click.UsageError("--recipe does not go with --bits: give one of them.")
    return value


bits_option = click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in BITS]),
    callback=bits_or_recipe,
    help="Quantize the language model to this many bits.  [default: as it is]",
)

recipe_option = click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    callback=bits_or_recipe,
    help="Quantize layer by layer: light is the smallest, balanced little larger, faithful closest to the float "
    "model; the others are MLX's small floats.",
)


def complete_files(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Has the shell complete the names of files, as click does for its own ``Path``, which checks more than we want."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def complete_folders(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Has the shell complete the names of folders."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


def _hush(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Leave out notes and bars, ours and the Hub's, until the command ends."""
    if not wanted:
        return
    ctx.meta[_QUIET] = True
    log, bars = logging.getLogger("mlx_janus"), "HF_HUB_DISABLE_PROGRESS_BARS"  # read as huggingface_hub is imported
    ctx.call_on_close(lambda level=log.level: log.setLevel(level))
    log.setLevel(logging.ERROR)
    if bars not in os.environ:
        ctx.call_on_close(lambda: os.environ.pop(bars, None))
        os.environ[bars] = "1"


def _quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and _QUIET in context.meta


_QUIET = "mlx_janus.quiet"

quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_hush,
    help="No progress and no notes on stderr; errors stay.",
)

show_option = click.option(
    "--show/--no-show",
    default=None,
    help="Show pictures in the terminal as they form.  [default: where it can, with colours]",
)

version_option = click.version_option(__version__, "-V", "--version", message="mlx_janus %(version)s")

weights_options = stack(
    click.option(
        "-m",
        "--model",
        metavar="MODEL",
        shell_complete=complete_folders,
        help="Converted folder, PyTorch model folder, Hub id such as deepseek-ai/Janus-Pro-1B, or janus-1.3b, "
        "janus-pro-1b, janus-pro-7b or tiny for short; PyTorch models are converted once, into a cache.  "
        "[default: Janus-Tiny, which is in the package]",
    ),
    bits_option,
    recipe_option,
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Type to compute in.  [default: the model's own; float32 on a CPU]",
    ),
    click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub."),
)

model_options = stack(
    weights_options,
    click.option(
        "--low-memory",
        is_flag=True,
        help="Hold one part of the model at a time, and read the others again when they are needed.",
    ),
)

SETTINGS: dict[str, click.ParamType] = {
    "temperature": FiniteRange(0, MAX_TEMPERATURE),
    "top_p": FiniteRange(0, 1, min_open=True),
    "max_tokens": click.IntRange(1, MAX_TOKENS),
    "cfg_weight": FiniteRange(0, MAX_CFG_WEIGHT),
    "seed": click.IntRange(0, MAX_SEED),
}
"""What may be set in a chat, and what each may be."""

sampling_options = stack(
    click.option(
        "--temperature",
        type=SETTINGS["temperature"],
        metavar="T",
        help="How much chance there is; 0: none.  [default: 0 to answer, the model's own to draw]",
    ),
    click.option(
        "--top-p",
        type=SETTINGS["top_p"],
        default=1.0,
        show_default=True,
        metavar="P",
        help="Choose among the likeliest tokens that hold this much probability.",
    ),
    click.option("--seed", type=SETTINGS["seed"], metavar="S", help="Repeat a result.  [default: random]"),
)

answering_options = stack(
    click.option("--max-tokens", type=SETTINGS["max_tokens"], metavar="N", help="Longest answer.  [default: 512]"),
    click.option(
        "--system", metavar="TEXT", help='System prompt of answers; "" for none.  [default: the model\'s own]'
    ),
)


def given(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those options that were given; the library has the defaults of the rest."""
    return {name: options[name] for name in names if options[name] is not None}


def load_model(options: dict[str, Any]) -> JanusPipeline:
    """``mlx_janus.load`` of what ``model_options`` gave, with a progress bar while a model is converted."""
    import_mlx()
    from ..pipeline import load

    choice = {name: options[name] for name in ("recipe", "dtype", "revision", "low_memory")}
    with byte_progress() as progress, logging_in_flags():
        return load(
            options["model"], bits=int(options["bits"]) if options["bits"] else None, progress=progress, **choice
        )


@contextlib.contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar in bytes on stderr, as ``stage_bars``."""
    with stage_bars("B") as report:
        yield report


@contextlib.contextmanager
def stage_bars(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr that appears with the first report of a stage; a new stage begins a new line."""
    stage = ""
    bar: Any = None

    def report(name: str, done: int, total: int) -> None:
        nonlocal stage, bar
        if name != stage:
            if bar is not None:
                bar.close()
            stage, bar = name, progress_bar(name, unit, total)
        bar.update(done - bar.n)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


def follow_drawing(
    steps: Iterable[ImageStep],
    n: int,
    finished: Callable[[GeneratedImage], None],
    preview: TerminalPreview | None = None,
) -> None:
    """Draw, with a bar of image tokens on stderr, and the pictures above it if there is a ``preview``.

    ``finished`` gets each picture while the bar is off the screen.
    """
    from tqdm import tqdm

    started = time.perf_counter()
    with progress_bar("drawing", "token") as bar:
        for step in steps:
            bar.total = step.total
            per_minute = 60 * n * step.index / step.total / (time.perf_counter() - started)
            bar.set_postfix_str(f"{per_minute:.2f} images/min", refresh=False)
            bar.update(step.index - bar.n)
            done = step.index == step.total and bool(step.images)
            if preview is not None and (preview.is_due(step) or done):
                with tqdm.external_write_mode(file=sys.stderr):
                    preview.look(step)
            for image in step.images:
                with tqdm.external_write_mode(file=sys.stderr):
                    finished(image)


def terminal_preview(show: bool | None) -> TerminalPreview | None:
    """What shows one drawing in the terminal, as ``show_option`` has it; None where nothing is shown."""
    from .preview import TerminalPreview, can_show

    wanted = can_show() and not _quiet() if show is None else show
    return TerminalPreview() if wanted else None


def progress_bar(title: str, unit: str, total: int | None = None) -> Any:
    """A progress bar, redrawn often on a terminal and rarely in a log."""
    from tqdm import tqdm

    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        total=total,
        file=sys.stderr,
        disable=sys.stderr is None or _quiet(),  # None: 2>&-
        mininterval=0.2 if on_terminal else 10.0,
    )


def check_output(path: Path, flag: str = "--output") -> None:
    """Refuse an output that cannot be written before minutes are spent on it; ``flag`` is what named it.

    Raises:
        OutputError: with the reason.
    """
    from ..errors import OutputError

    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{folder} is no folder: make it first, or name another with {flag}")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} cannot be written to: name another folder with {flag}")


def make_folder(path: Path, flag: str = "--output") -> None:
    """Make a folder to draw into, unless it is there; ``flag`` is what named it.

    Raises:
        OutputError: with the reason.
    """
    from ..errors import OutputError

    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be made ({error.strerror}): name another folder with {flag}") from None
    check_output(path / "picture.png", flag)
