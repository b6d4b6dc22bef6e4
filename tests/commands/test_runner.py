"""How commands run: rules, exit codes, errors in one line, and quiet."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest

from mlx_janus.__main__ import main
from mlx_janus.commands.options import flag_needs, quiet_option, refuse_if
from mlx_janus.commands.runner import (
    Command,
    Group,
    check_working_folder,
    deleted_folder,
    explain,
    import_mlx,
    is_quiet,
    note,
    require_train_extra,
    say,
)
from mlx_janus.errors import ImageError, JanusError, OptionError, OutputError
from mlx_janus.installation import install_command
from tests.support.programs import Outcome, call, error_line


def command(error: BaseException | None = None, code: object = None, **attributes: Any) -> Command:
    """A command with two options that raises an error, or returns a code."""

    def callback(**_: object) -> object:
        if error is not None:
            raise error
        return code

    options = [click.Option(["--low-memory"], is_flag=True), click.Option(["--model"])]
    return Command("try", callback=callback, params=options, **attributes)


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (JanusError("two\nlines"), 1, "Error: two lines\n"),
        (OptionError("n must be 1"), 1, "Error: n must be 1\n"),
        (
            OSError(28, "No space left on device", "out.png"),
            1,
            "Error: out.png: No space left on device\n",
        ),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
        (click.Abort(), 130, "stopped\n"),
        (BrokenPipeError(), 1, ""),
        (click.ClickException("no"), 1, "Error: no\n"),
    ],
)
def test_errors_are_one_line_and_a_code(error: BaseException, code: int, stderr: str) -> None:
    group = Group(commands={"try": command(error)})
    for done in (call(command(error)), call(group, "try")):
        assert (done.code, done.stdout, done.stderr) == (code, "", stderr)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), ("a string", 0)])
def test_an_integer_that_is_returned_is_the_code(returned: object, code: int) -> None:
    assert call(command(code=returned)).code == code


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        call(command(KeyError("x")))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (JanusError(" a \n b"), "a b"),
        (OSError("odd"), "odd"),
        (MemoryError(), "there is not enough memory: close other programs, or pass --bits 4"),
        (
            RuntimeError("[malloc] Unable to allocate"),
            "there is not enough memory: close other programs, or pass --bits 4",
        ),
        (RuntimeError("[conv] bad shape"), "MLX failed: [conv] bad shape"),
        (RuntimeError("plain"), None),
        (ValueError("[malloc] Unable to allocate"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_what_a_person_can_act_on_is_explained(error: BaseException, line: str | None) -> None:
    assert explain(error) == line


def test_rules_are_checked_in_order_before_the_command_runs() -> None:
    rules = (
        flag_needs("--low-memory", "--model", "name one"),
        refuse_if(lambda values: values["model"] == "x", "x is no model."),
        refuse_if(lambda values: values["model"] in ("x", "y"), "neither is y."),
    )
    ruled = command(AssertionError("it ran"), rules=rules)
    for words, reason in [
        (["--low-memory"], "--low-memory needs --model: name one."),
        (["--low-memory", "--model", "x"], "x is no model."),
        (["--model", "y"], "neither is y."),
    ]:
        done = call(ruled, *words)
        assert (done.code, done.stdout) == (2, "")
        assert done.stderr.startswith("Usage: program")
        assert done.stderr.endswith(f"Error: {reason}\n")
    assert call(command(rules=rules), "--low-memory", "--model", "z").code == 0
    assert (
        call(ruled, "--low-memory", "--help").code == 0
    )  # which asks nothing of the other options


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    yield
    assert not is_quiet()


@pytest.mark.usefixtures("environment")
def test_a_quiet_command_says_only_what_must_be_said() -> None:
    found: list[bool] = []

    @click.command(cls=Command)
    @quiet_option
    @click.pass_context
    def talk(ctx: click.Context) -> None:
        def elsewhere() -> None:
            with ctx.scope(cleanup=False):  # as the server's thread does
                found.append(is_quiet())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        found.append("HF_HUB_DISABLE_PROGRESS_BARS" in os.environ)
        found.append(logging.getLogger("mlx_janus").level == logging.ERROR)
        note("a note")
        say("a line")

    assert call(talk, "-q").stderr == "a line\n"
    assert found == [True] * 3
    assert call(talk).stderr == "a note\na line\n"
    assert found[3:] == [False] * 3


def test_mlx_is_imported_once_and_signals_are_left_alone() -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    import_mlx()
    assert signal.getsignal(signal.SIGINT) is before


def test_packages_for_training_are_named_if_they_are_missing() -> None:
    require_train_extra("click", "math")

    def train() -> None:
        require_train_extra("math", "no_such_package", "other")

    line = error_line(call(Command("train", callback=train)))
    assert line == f"Error: no_such_package is not installed: {install_command('train')}"


# A working folder that was deleted


@pytest.fixture
def deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of this process, which does not exist any more."""
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    monkeypatch.setenv("PWD", str(folder))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "-p", "x"],
        ["generate", "-p", "x", "-o", "/tmp/x.png"],
        ["generate", "--prompts-file", "prompts.txt"],
        ["caption", "a.png"],
        ["chat"],
        ["serve"],
        ["convert", "a", "b"],
        ["models"],
        ["models", "remove", "x"],
        ["evaluate", "shapes"],
        ["train", "tiny", "-o", "runs"],
        ["doctor"],
    ],
)
def test_every_command_names_a_deleted_working_folder(deleted: Path, words: list[str]) -> None:
    line = f"Error: the working folder {deleted} does not exist any more: change to another folder"
    assert call(main, *words) == Outcome(1, "", f"{line}\n")


def test_help_needs_no_working_folder(deleted: Path) -> None:
    for words in (["--help"], ["--version"], ["generate", "--help"], ["models", "add", "--help"]):
        assert call(main, *words).code == 0


def test_a_working_folder_that_is_deleted_meanwhile(deleted: Path) -> None:
    """Where the system does not know the path, the shell's is shown."""
    for error in (FileNotFoundError(2, "No such file"), OutputError("x"), ImageError("x")):
        assert f"the working folder {deleted} does not exist" in str(explain(error))
    assert explain(OptionError("n must be 1")) == "n must be 1"
    with mock.patch.object(os, "readlink", side_effect=FileNotFoundError):
        assert str(deleted) in str(deleted_folder())


def test_a_working_folder_that_exists() -> None:
    assert deleted_folder() is None
    check_working_folder()
