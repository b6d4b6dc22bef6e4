"""Environments of clients: a virtual environment or a folder of npm for each, kept in a cache."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from .catalog import Client

_STAMP = "installed.txt"  # the requirements of an environment, written when all are installed


class InstallError(Exception):
    """A client cannot be installed; the message is one line."""


def install(client: Client, cache: Path) -> Path:
    """Install a client, unless the cache has it.

    A version that the registry does not have is replaced by the newest one.

    Returns:
        The folder of its environment.

    Raises:
        InstallError: pip or npm fails.
    """
    folder = cache / client.name
    stamp = folder / _STAMP
    wanted = "\n".join(client.packages) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    prepare, command = _commands(client, folder)
    _run(prepare, folder)
    try:
        _run([*command, *client.packages], folder)
    except InstallError:
        without_versions = [re.sub(r"==.*|(?<=.)@[\d.]+$", "", name) for name in client.packages]
        _run([*command, *without_versions], folder)
    stamp.write_text(wanted)
    return folder


def _commands(client: Client, folder: Path) -> tuple[list[str], list[str]]:
    """Return the command that makes an environment, and the one that installs packages there."""
    if client.needs_node:
        # Install scripts download prebuilt parts that no trial needs.
        npm = ["npm", "install", "--prefix", ".", "--no-fund", "--no-audit", "--ignore-scripts"]
        return ["npm", "init", "--yes"], npm
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    return [sys.executable, "-m", "venv", "."], pip


def _run(command: list[str], folder: Path) -> None:
    """Run a command in a folder.

    Raises:
        InstallError: it fails; the message has the last line of its output.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise InstallError(f"{Path(command[0]).name} failed: {lines[-1]}")


def versions(client: Client, folder: Path) -> str:
    """Return the installed versions of a client's packages, such as "openai 3.57.0"."""
    names = [re.sub(r"==.*|(?<=.)@[\d.]+$", "", name) for name in client.packages]
    find = _npm_version if client.needs_node else _pip_version
    return ", ".join(f"{name} {find(name.partition('[')[0], folder)}" for name in names)


def _pip_version(name: str, folder: Path) -> str:
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    command = [str(folder / "bin" / "python"), "-c", code, name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _npm_version(name: str, folder: Path) -> str:
    package = json.loads((folder / "node_modules" / name / "package.json").read_text())
    return str(package["version"])
