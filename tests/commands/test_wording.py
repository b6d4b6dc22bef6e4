"""A fix is named as a Python keyword by the library, and as a flag by the commands."""

from __future__ import annotations

import ast
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import mlx_janus
from mlx_janus.__main__ import main as group
from mlx_janus.commands.wording import _FLAGS, flags_in_log_messages, to_flags
from mlx_janus.config import JanusConfig
from mlx_janus.errors import JanusError
from mlx_janus.server.settings import Settings
from mlx_janus.weights import footprint, quantize
from mlx_janus.weights.convert import Source, convert_checkpoint
from mlx_janus.weights.folder import check_output
from mlx_janus.weights.upload import check_upload
from tests.support.golden import FIXTURES

PACKAGE = Path(mlx_janus.__file__).parent
SOURCE = FIXTURES / "deepseek-pro-bin"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            "it is there: pass overwrite=True to replace it",
            "it is there: pass --overwrite to replace it",
        ),
        ("too large: bits=8 needs 3 GB", "too large: --bits 8 needs 3 GB"),
        ('too large: recipe="light" needs 2 GB', "too large: --recipe light needs 2 GB"),
        ("with bits=4, low_memory=True it fits", "with --bits 4 --low-memory it fits"),
        ("leave bits=... and recipe=... out", "leave --bits and --recipe out"),
        ("set api_key=..., or leave host=... out", "set --api-key, or leave --host out"),
        ('so pass roles="plain" for the others', "so pass --roles plain for the others"),
        ('try path_or_hub_id="deepseek-ai/Janus-Pro-1B".', "try --model deepseek-ai/Janus-Pro-1B."),
    ],
)
def test_keywords_are_spelled_as_flags(message: str, shown: str) -> None:
    assert to_flags(message) == shown


@pytest.mark.parametrize(
    "message",
    [
        "bits=8 exists already",  # a file of that name, as are the next
        "out/bits=8 exists already",
        "'bits=8' is no Hub id",
        "the model cfg-bits=8 is absent",
        "the model bits=8bit is absent",
        "the model bits=8/x is absent",
        "the model bits=eight is absent",
        'the model recipe="a b" is absent',
        "the model seed=3 is absent",  # which no message names
        "leave bits and recipe out",
    ],
)
def test_other_text_is_left_as_it_is(message: str) -> None:
    assert to_flags(message) == message


# What the library raises, and what a command says of it


def _memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_checkpoint(Source(SOURCE, "x"), tmp_path / "model")
    config = JanusConfig.load(tmp_path / "model" / "config.json")
    small = max(footprint.required_memory(config, "float32", low_memory=True).values())
    monkeypatch.setattr(footprint, "available_memory", lambda: small)
    footprint.check_memory(config, "float32", "it")


def _narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_checkpoint(Source(SOURCE, "x"), tmp_path / "model")
    monkeypatch.setitem(quantize._BITS_AND_GROUP_SIZES, "affine", ((8,), (1 << 20,)))
    quantize.plan_quantization(JanusConfig.load(tmp_path / "model" / "config.json"), 8)


def _full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 0))
    convert_checkpoint(Source(SOURCE, "x"), tmp_path / "model")


FAILURES: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], str, str]] = {
    "overwrite": (
        lambda folder, _: check_output(folder.parent, overwrite=False),
        ": pass overwrite=True to replace it, or choose another folder",
        ": pass --overwrite to replace it, or choose another folder",
    ),
    "memory": (
        _memory,
        ": low_memory=True needs 9 MB and fits",
        ": --low-memory needs 9 MB and fits",
    ),
    "narrow": (_narrow, ": leave bits=... and recipe=... out", ": leave --bits and --recipe out"),
    "disk": (_full, ": make room, or take fewer bits=...", ": make room, or take fewer --bits"),
    "hub id": (
        lambda *_: check_upload("x"),
        ": repo_id=... takes owner/name",
        ": --upload takes owner/name",
    ),
    "key": (
        lambda *_: Settings(api_key="two words"),
        "the key, of api_key=... or MLX_JANUS_API_KEY, must be "
        "1 to 512 letters, digits and signs, without spaces",
        "the key, of --api-key or MLX_JANUS_API_KEY, must be "
        "1 to 512 letters, digits and signs, without spaces",
    ),
    "no host": (
        lambda *_: Settings(host=" "),
        "the host is empty: give an address or a name, or leave host=... out",
        "the host is empty: give an address or a name, or leave --host out",
    ),
    "host": (
        lambda *_: Settings(host="0.0.0.0"),
        ": set a key with api_key=..., or leave host=... out",
        ": set a key with --api-key, or leave --host out",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_library_speaks_python_and_the_commands_flags(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail, said, shown = FAILURES[name]
    with pytest.raises(JanusError) as caught:
        fail(tmp_path, monkeypatch)
    assert str(caught.value).endswith(said)
    assert to_flags(str(caught.value)).endswith(shown)


def test_the_log_speaks_flags_while_a_command_runs(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("mlx_janus")
    with flags_in_log_messages():
        log.warning("%s is small: take bits=%d", "it", 8)
    log.warning("take bits=8")
    assert caplog.messages == ["it is small: take --bits 8", "take bits=8"]


def test_every_flag_of_the_table_is_an_option_of_a_command() -> None:
    context = click.Context(group)
    commands = [group.get_command(context, name) for name in ("generate", "convert", "serve")]
    options = {
        flag for command in commands if command for param in command.params for flag in param.opts
    }
    assert set(_FLAGS.values()) <= options


def test_no_text_of_the_library_names_a_flag() -> None:
    library = [
        path
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in _COMMANDS
    ]
    assert len(library) > 40
    found = [
        (path.name, text)
        for path in library
        for text in _texts(path)
        if re.search(r"(?<![\w-])--[a-z]", text)
    ]
    assert found == []


_COMMANDS = (
    "commands",
    "__main__.py",
    "server",
)  # the server's replies name its own flags to whoever runs it


def _texts(path: Path) -> list[str]:
    """Every string of a module, except its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [
        node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in bare
    ]
    return [node.value for node in constants if isinstance(node.value, str)]
