"""A release has one version, and its workflows, forms and lists name things that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import mlx_janus
from tests.support.programs import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(path: Path) -> Any:
    """Return the content of a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow: Any) -> list[dict[str, Any]]:
    """Return the steps of all jobs of a workflow."""
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_version_is_in_one_place() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    source = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    lines = re.findall(r'^__version__ = "(.+)"$', source.read_text(encoding="utf-8"), re.MULTILINE)
    assert lines == [mlx_janus.__version__]
    assert "version" not in read(ROOT / "CITATION.cff")


def test_the_citation_names_both_papers() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["license"] == PROJECT["project"]["license"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    urls = [paper["url"] for paper in citation["references"]]
    assert urls == re.findall(r"https://arxiv\.org/abs/[\d.]+", readme)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_commands_of_a_workflow_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    commands = "\n".join(step.get("run", "") for step in steps(read(path)))
    named = set(re.findall(r"\bmake ([\w-]+)", commands))
    assert named <= targets
    scripts = set(re.findall(r"(?<![\w/])\.ci/[\w-]+", commands + makefile))
    assert all((ROOT / script).is_file() for script in scripts)
    assert named | scripts


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_have_versions_and_permissions_are_least(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    granted = [job["permissions"] for job in workflow["jobs"].values() if "permissions" in job]
    assert granted in ([], [{"id-token": "write"}])
    for step in steps(workflow):
        assert "secrets." not in str(step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step["uses"])


def test_only_a_tag_publishes_after_every_installation() -> None:
    jobs = read(GITHUB / "workflows" / "release.yml")["jobs"]
    assert jobs["install"]["needs"] == "build"
    assert "macos-15" in jobs["install"]["strategy"]["matrix"]["os"]
    publish = jobs["publish"]
    assert publish["needs"] == "install"
    assert "github.ref_type == 'tag'" in publish["if"]
    assert [step["uses"].split("@")[0] for step in publish["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]
    others = [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})]
    assert others == ["publish"]


def test_the_release_extra_is_what_the_workflow_installs() -> None:
    commands = [step.get("run", "") for step in steps(read(GITHUB / "workflows" / "release.yml"))]
    install = next(command for command in commands if "pip install" in command)
    assert re.findall(r"'(.+?)'", install) == PROJECT["project"]["optional-dependencies"]["release"]


def test_the_forms_for_issues_ask_for_the_output_of_doctor() -> None:
    forms = {path.stem: read(path) for path in FORMS if path.stem != "config"}
    assert set(forms) == {"bug", "idea", "machine"}
    for name, form in forms.items():
        assert form["name"]
        assert form["description"]
        fields = {field["id"]: field for field in form["body"] if "id" in field}
        assert "mlx-janus doctor --json" in fields["doctor"]["attributes"]["label"]
        required = fields["doctor"].get("validations", {}).get("required", False)
        assert required == (name != "idea")


def test_the_source_distribution_has_every_file_but_those_of_editors() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    assert all((ROOT / name).exists() for name in included)
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("only a clone knows its files")
    command = [git, "-C", str(ROOT), "ls-files"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tracked = {line.split("/")[0] for line in listed.splitlines()}
    always = {"pyproject.toml", ".gitignore"}  # hatchling adds them
    assert tracked - always - set(included) == {".editorconfig", ".pre-commit-config.yaml"}


def test_the_prompt_of_the_first_command_is_found(tmp_path: Path) -> None:
    """``.ci/try-wheel`` generates the README's first image, so it must find its prompt."""
    script = (ROOT / ".ci" / "try-wheel").read_text(encoding="utf-8")
    program = re.search(r"sed -n '(.+)' \"", script)
    assert program is not None
    command = ["sed", "-n", program[1], str(ROOT / "README.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "a red circle above a blue square"
