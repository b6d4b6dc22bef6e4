"""The command that adds an extra is right for every way to install the package."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_janus import installation
from mlx_janus.installation import install_command

REQUIREMENTS = """\
Requires-Dist: numpy>=1.26
Requires-Dist: mlx[cuda13]>=0.32.4; (sys_platform == 'linux') and extra == 'cuda'
Requires-Dist: fastapi>=0.115; extra == 'server'
Requires-Dist: uvicorn<0.55,>=0.34; extra == 'server'
"""


class Environment:
    """A virtual environment with the record of an installation, but without the package."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.record = folder / "lib" / "mlx_janus-0.1.0.dist-info"
        self.record.mkdir(parents=True)
        text = f"Metadata-Version: 2.4\nName: mlx-janus\nVersion: 0.1.0\n{REQUIREMENTS}"
        (self.record / "METADATA").write_text(text)
        self.installed_by("pip")
        (folder / "bin").mkdir()
        program = folder / "bin" / "pip"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "path", [str(self.record.parent)])
        monkeypatch.setattr(sys, "prefix", str(folder))
        monkeypatch.setattr(sys, "executable", str(folder / "bin" / "python"))
        monkeypatch.setenv("PATH", str(folder / "bin"))
        monkeypatch.setenv("VIRTUAL_ENV", str(folder))

    def installed_by(self, name: str) -> None:
        """Record the installer."""
        (self.record / "INSTALLER").write_text(f"{name}\n")

    def came_from(self, **origin: Any) -> None:
        """Record the origin of the package."""
        (self.record / "direct_url.json").write_text(json.dumps(origin))


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Return an environment into which pip installed the package from an index."""
    return Environment(tmp_path / "environment", monkeypatch)


def test_an_index(environment: Environment) -> None:
    assert install_command("server") == "pip install 'mlx-janus[server]'"


@pytest.mark.parametrize("editable", [True, False])
def test_a_clone(environment: Environment, tmp_path: Path, editable: bool) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    environment.came_from(url=clone.as_uri(), dir_info={"editable": True} if editable else {})
    words = shlex.split(install_command("server"))
    assert words == ["pip", "install", *(["-e"] if editable else []), f"{clone}[server]"]


def test_a_wheel_file(environment: Environment, tmp_path: Path) -> None:
    wheel = tmp_path / "mlx_janus-0.1.0-py3-none-any.whl"
    wheel.touch()
    environment.came_from(url=wheel.as_uri(), archive_info={})
    assert install_command("heic") == f"pip install '{wheel}[heic]'"


def test_an_origin_that_is_gone_leaves_the_requirements(environment: Environment) -> None:
    environment.came_from(url="file:///no/such/mlx_janus-0.1.0-py3-none-any.whl", archive_info={})
    assert install_command("server") == "pip install 'fastapi>=0.115' 'uvicorn<0.55,>=0.34'"
    assert install_command("cuda") == "pip install 'mlx[cuda13]>=0.32.4'"


def test_a_repository_and_an_address(environment: Environment) -> None:
    version_control = {"vcs": "git", "commit_id": "abc123"}
    environment.came_from(url="https://example.org/mlx_janus.git", vcs_info=version_control)
    shown = "'mlx-janus[server] @ git+https://example.org/mlx_janus.git@abc123'"
    assert install_command("server") == f"pip install {shown}"
    environment.came_from(url="https://example.org/m.whl", archive_info={})
    assert (
        install_command("server") == "pip install 'mlx-janus[server] @ https://example.org/m.whl'"
    )


def test_a_clone_that_is_only_on_the_path(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    clone = tmp_path / "clone"
    clone.mkdir()
    monkeypatch.setattr(installation, "_CLONE", clone)
    assert install_command("server") == "pip install 'mlx-janus[server]'"
    (clone / "pyproject.toml").touch()
    assert install_command("server") == f"pip install -e '{clone}[server]'"


def test_an_environment_that_is_not_active_is_named(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install_command("server") == f"{sys.executable} -m pip install 'mlx-janus[server]'"


def test_uv(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    environment.installed_by("uv")
    assert install_command("server") == "uv pip install 'mlx-janus[server]'"
    monkeypatch.delenv("VIRTUAL_ENV")
    expected = f"uv pip install --python {sys.executable} 'mlx-janus[server]'"
    assert install_command("server") == expected


@pytest.mark.parametrize(
    ("record", "package", "dependencies"),
    [
        ("uv-receipt.toml", "uv tool install --force", "uv pip install --python"),
        ("pipx_metadata.json", "pipx install --force", "pipx inject mlx-janus"),
    ],
)
def test_a_tool_is_installed_again_with_the_extra(
    environment: Environment, record: str, package: str, dependencies: str, tmp_path: Path
) -> None:
    (environment.folder / record).touch()
    wheel = tmp_path / "mlx_janus-0.1.0-py3-none-any.whl"
    wheel.touch()
    environment.came_from(url=wheel.as_uri(), archive_info={})
    assert install_command("server") == f"{package} '{wheel}[server]'"
    wheel.unlink()
    assert install_command("server").startswith(f"{dependencies} ")
    assert install_command("server").endswith(" 'fastapi>=0.115' 'uvicorn<0.55,>=0.34'")
