"""``mlx-janus doctor``: find faults of this machine and this installation, and give advice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from .options import version_option
from .runner import Command, import_mlx

if TYPE_CHECKING:
    from .diagnosis import Finding


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array instead.")
@version_option
def main(as_json: bool) -> int:
    """Check versions, device, memory, BLAS, disk, models and roles, and give advice on problems.

    For every model on this machine that cannot be used, the advice says what its folder lacks.

    The exit code is 1 if the package itself does not work, otherwise 0.

    \b
    Examples:
      mlx-janus doctor
      mlx-janus doctor --json
    """
    with contextlib.suppress(ImportError):  # ``diagnose`` reports a missing MLX
        import_mlx()
    from .diagnosis import diagnose

    findings = diagnose()
    if as_json:
        facts = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        _print_findings(findings)
    return int(any(finding.status == "fail" for finding in findings))


def _print_findings(findings: Sequence[Finding]) -> None:
    """Print a line for each finding, then the advice of each finding that has advice.

    Advice of several lines is printed as several items.
    """
    width = max(len(finding.about) for finding in findings)  # columns for the checks' names
    for finding in findings:
        click.echo(f"{finding.about:{width}}  {finding.status:4}  {finding.text}")
    with_advice = [finding for finding in findings if finding.advice]
    if with_advice:
        click.echo("\nWhat to do:")
    for finding in with_advice:
        for line in finding.advice.splitlines():
            click.echo(f"- {finding.about}: {line}")
