"""The command that adds an optional extra to this installation.

pip and uv record the origin of a package in ``direct_url.json`` (PEP 610). A package from an index
has no such record.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

_NAME = "mlx-janus"
_CLONE = Path(__file__).resolve().parent.parent  # the clone, if the package runs from one


class _Installer(NamedTuple):
    """The commands of the program that made this environment."""

    package: str  # installs this package, with its dependencies
    dependencies: str  # installs other packages into the same environment


def install_command(extra: str) -> str:
    """Return the shell command that adds an extra to this installation.

    The command takes the package from its origin: a clone, a folder, a wheel file, a repository, an
    address or an index. If a file or folder does not exist any more, the command names the extra's
    requirements instead.

    Args:
        extra: name of an extra in ``pyproject.toml``, such as "server".
    """
    target = _target(extra)
    if target:
        return f"{_installer().package} {target}"
    requirements = [shlex.quote(requirement) for requirement in _requirements(extra)]
    return " ".join([_installer().dependencies, *requirements])


def _target(extra: str) -> str:
    """Return the arguments that name this package with an extra; "" if its origin is gone."""
    try:
        record = metadata.distribution(_NAME).read_text("direct_url.json")
    except metadata.PackageNotFoundError:  # the clone is only on Python's path
        has_project = (_CLONE / "pyproject.toml").is_file()
        return _local_target(_CLONE, extra, editable=True) if has_project else ""
    if record is None:
        return shlex.quote(f"{_NAME}[{extra}]")
    origin: dict[str, Any] = json.loads(record)
    address = urlsplit(origin["url"])
    if address.scheme == "file" and "vcs_info" not in origin:
        editable = origin.get("dir_info", {}).get("editable", False)
        return _local_target(Path(url2pathname(address.path)), extra, editable)
    url = origin["url"]
    if version_control := origin.get("vcs_info"):
        url = f"{version_control['vcs']}+{url}@{version_control['commit_id']}"
    return shlex.quote(f"{_NAME}[{extra}] @ {url}")


def _local_target(path: Path, extra: str, editable: bool) -> str:
    """Return the arguments that name a folder or an archive with an extra; "" if it is gone."""
    if not path.exists():
        return ""
    target = shlex.quote(f"{path}[{extra}]")
    return f"-e {target}" if editable else target


def _requirements(extra: str) -> list[str]:
    """Return the requirements of an extra, such as "uvicorn>=0.34,<0.55"."""
    try:
        lines = metadata.requires(_NAME) or []
    except metadata.PackageNotFoundError:
        return [f"{_NAME}[{extra}]"]
    marker = re.compile(rf"""extra == ['"]{extra}['"]""")
    return [line.split(";")[0].strip() for line in lines if marker.search(line)]


def _installer() -> _Installer:
    """Return the commands of pip, uv or pipx, for the environment of this process."""
    prefix = Path(sys.prefix)
    python = shlex.quote(sys.executable)
    uv_here = f"uv pip install --python {python}"
    if (prefix / "uv-receipt.toml").is_file():
        return _Installer("uv tool install --force", uv_here)
    if (prefix / "pipx_metadata.json").is_file():
        return _Installer("pipx install --force", f"pipx inject {_NAME}")
    if _installed_by_uv():
        active = os.environ.get("VIRTUAL_ENV") == sys.prefix
        uv = "uv pip install" if active else uv_here
        return _Installer(uv, uv)
    found = shutil.which("pip")
    # The pip that the shell would find may belong to another environment.
    active = found is not None and Path(found).parent == Path(sys.executable).parent
    pip = "pip install" if active else f"{python} -m pip install"
    return _Installer(pip, pip)


def _installed_by_uv() -> bool:
    """Return whether uv installed this package. Its environments have no pip."""
    try:
        name = metadata.distribution(_NAME).read_text("INSTALLER")
    except metadata.PackageNotFoundError:
        return False
    return (name or "").strip() == "uv"
