"""Commands as processes: exit codes, signals, closed streams, and lines on stderr.

Results are printed to stdout, everything else to stderr. The exit code is 0 after success, 2 for an
error in the command line, 130 after Ctrl-C, 143 after SIGTERM (0 for ``serve``, from the
loading of the model on), and 1 for any other failure.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import click

from ..errors import ConversationError, ImageError, JanusError, OutputError, one_line
from ..installation import install_command
from .wording import to_flags

Rule = Callable[[click.Context], str | None]
"""A function that returns why it refuses the values of a command line, or None."""

_QUIET = "mlx_janus.quiet"  # key in a context's ``meta``


class _ExitCodes:
    """A mixin for click's commands and groups: an error becomes a message and an exit code.

    Bugs keep their traceback. In a call from Python with ``standalone_mode=False``, all errors are
    raised, and the process is left as it is.
    """

    def __init__(self, *args: Any, context_settings: dict[str, Any] | None = None, **extra: Any):
        settings = {"help_option_names": ["-h", "--help"]} | (context_settings or {})
        super().__init__(*args, context_settings=settings, **extra)  # type: ignore[call-arg]

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command line and exit; without ``standalone_mode``, return the command's value.

        A command may return its exit code. Any other value means success.
        """
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)  # type: ignore[misc]
        _prepare_process()
        try:
            # Without click's standalone mode, which would handle the errors and exit itself.
            code = super().main(*args, standalone_mode=False, **extra)  # type: ignore[misc]
        except click.ClickException as error:
            # In a deleted working folder, click's message would be about a file that is not found.
            if (message := deleted_folder()) is not None:
                say(f"Error: {message}")
                sys.exit(1)
            error.show()
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):  # click has printed a line break after the ^C
            say("stopped")
            sys.exit(130)
        except BrokenPipeError:  # the reader of stdout has closed it, as `| head` does
            _drop_stdout()
            sys.exit(1)
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            if isinstance(error, OSError):  # stdout itself may have failed, as on a full disk
                _drop_stdout()
            say(f"Error: {message}")
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


class Command(_ExitCodes, click.Command):
    """A click command with this package's exit codes.

    Args:
        rules: checked in order before the command runs. The first rule that gives a reason ends
            the command with exit code 2.
    """

    def __init__(self, *args: Any, rules: Sequence[Rule] = (), **extra: Any):
        super().__init__(*args, **extra)
        self.rules = tuple(rules)

    def invoke(self, ctx: click.Context) -> Any:
        """Check the working folder and the rules, and run the command.

        Raises:
            JanusError: the working folder was deleted.
            click.UsageError: a rule refuses the command line.
        """
        check_working_folder()
        for rule in self.rules:
            reason = rule(ctx)
            if reason is not None:
                raise click.UsageError(reason, ctx)
        return super().invoke(ctx)


class Group(_ExitCodes, click.Group):
    """A click group with this package's exit codes."""


# The process


def _prepare_process() -> None:
    """Reopen closed standard streams, handle SIGTERM, and print unencodable characters as "?".

    Closed streams are opened on the null device. Otherwise files that are opened later would get
    their file descriptors. MLX takes the descriptor 0 for a failure, and libraries would print into
    a file with the descriptor 1 or 2.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    # Python has no object for a stream that was closed.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115, PTH123
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    with contextlib.suppress(ValueError):  # only the main thread may set a handler
        signal.signal(signal.SIGTERM, _exit_on_sigterm)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _exit_on_sigterm(*_: object) -> None:
    """Exit with code 143. The exception unwinds the stack, so that temporary files are removed."""
    sys.exit(128 + signal.SIGTERM)


def import_mlx() -> None:
    """Import MLX, and delay Ctrl-C and SIGTERM until the import is done.

    A signal's exception during MLX's initialisation would abort the process. Blocking the signals
    is not enough: another thread, such as one of OpenBLAS, would receive them, and Python would
    still interrupt this thread.

    Only the main thread may set signal handlers. In any other thread, this function does nothing.
    """
    if "mlx.core" in sys.modules or threading.current_thread() is not threading.main_thread():
        return
    received: list[int] = []
    old_handlers = {}  # by signal
    for delayed in (signal.SIGINT, signal.SIGTERM):
        old_handlers[delayed] = signal.signal(delayed, lambda number, _: received.append(number))
    try:
        import mlx.core  # noqa: F401
    finally:
        for delayed, handler in old_handlers.items():
            signal.signal(delayed, handler)
    for number in received:
        signal.raise_signal(number)


def check_working_folder() -> None:
    """Check that the working folder was not deleted.

    Raises:
        JanusError: the folder was deleted.
    """
    message = deleted_folder()
    if message is not None:
        raise JanusError(message)


def deleted_folder() -> str | None:
    """Return a message if the working folder was deleted, otherwise None."""
    try:
        os.getcwd()  # noqa: PTH109  Path.cwd only calls it
    except OSError:
        path = _former_path()
        shown_path = f" {path}" if path else ""
        return f"the working folder{shown_path} does not exist any more: change to another folder"
    return None


def _former_path() -> str:
    """Return the path that a deleted working folder had; "" if it is unknown."""
    try:
        return os.readlink("/proc/self/cwd").removesuffix(" (deleted)")  # noqa: PTH115  Linux only
    except OSError:
        return os.environ.get("PWD", "")  # set by the shell


def require_train_extra(*packages: str) -> None:
    """Check that the named packages, which the extra "train" installs, are installed.

    Raises:
        JanusError: a package is missing.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise JanusError(f"{name} is not installed: {install_command('train')}")


def _drop_stdout() -> None:
    """Redirect stdout to the null device, because Python's flush at exit would fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stdout is closed or not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Errors and notes


def explain(error: BaseException) -> str | None:
    """Return a one-line message about an error that the user can mend; None for a bug.

    If the working folder was deleted, an error of a file becomes a message about the folder.
    """
    if isinstance(error, OSError | ImageError | OutputError | ConversationError):
        deleted = deleted_folder()
        if deleted is not None:
            return deleted
    text = " ".join(str(error).split())
    if isinstance(error, JanusError):
        return to_flags(text)  # the library names Python keywords, which here are flags
    if isinstance(error, OSError):
        reason = error.strerror or text
        return one_line(f"{error.filename}: {reason}" if error.filename else reason)
    # MLX raises plain RuntimeErrors. Their text begins with a function's name in brackets, such as
    # "[malloc]", or with the word "Unable".
    from_mlx = type(error) is RuntimeError and text.startswith(("[", "Unable"))
    out_of_memory = from_mlx and any(word in text for word in ("alloc", "Memory"))
    if out_of_memory or isinstance(error, MemoryError):
        return "there is not enough memory: close other programs, or pass --bits 4"
    if from_mlx:
        return f"MLX failed: {text}"
    return None


def say(message: str) -> None:
    """Print a line to stderr."""
    click.echo(message, err=True)


def note(message: str) -> None:
    """Print a line to stderr, unless the command is quiet."""
    if not is_quiet():
        say(message)


def is_quiet() -> bool:
    """Return whether the running command hides notes and progress bars; False without a command."""
    context = click.get_current_context(silent=True)
    return context is not None and _QUIET in context.meta


def be_quiet(ctx: click.Context) -> None:
    """Hide notes and progress bars, including huggingface_hub's, until the command ends.

    A process may run several commands, so the settings are restored when the context closes.
    """
    ctx.meta[_QUIET] = True
    log = logging.getLogger("mlx_janus")
    ctx.call_on_close(lambda level=log.level: log.setLevel(level))
    log.setLevel(logging.ERROR)
    hub_switch = "HF_HUB_DISABLE_PROGRESS_BARS"  # read when huggingface_hub is imported
    if hub_switch not in os.environ:  # otherwise keep the user's choice
        ctx.call_on_close(lambda: os.environ.pop(hub_switch, None))
        os.environ[hub_switch] = "1"
