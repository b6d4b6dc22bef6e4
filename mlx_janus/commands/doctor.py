"""``mlx-janus doctor``: find faults of this machine and this installation, and give advice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from .options import version_option
from .outputs import check_writable, output_file
from .runner import Command, import_mlx, note

if TYPE_CHECKING:
    from .diagnosis import Finding


_NEEDS_CHECK = ("parts", "model", "report")  # options of --check


def _refuse_without_check(ctx: click.Context) -> str | None:
    """Return why an option of --check is refused without it, or None."""
    if ctx.params["check"]:
        return None
    for name in _NEEDS_CHECK:
        if ctx.params[name]:
            flag = "--part" if name == "parts" else f"--{name}"
            return f"{flag} needs --check"
    return None


@click.command(cls=Command, rules=[_refuse_without_check])
@click.option(
    "--check",
    is_flag=True,
    help="Compute stored numbers of DeepSeek's code again, on the CPU and the GPU, and time both.",
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(("numbers", "quantization", "branches", "tokens", "speed")),
    help="With --check: only this part. Can be repeated.",
)
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    help="With --check: also check this model: a folder, a Hub id or a short name.",
)
@click.option(
    "--report",
    type=click.Path(),
    metavar="FILE",
    help="With --check: also write a report in Markdown to this file, to paste into an issue.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array instead.")
@version_option
def main(
    check: bool, parts: tuple[str, ...], model: str | None, report: str | None, as_json: bool
) -> int:
    """Check versions, device, memory, BLAS, disk, models and roles, and give advice on problems.

    For every model on this machine that cannot be used, the advice says what its folder lacks.

    With --check, the package computes on this machine what its tests compute: the stages of the
    network, quantized layers, the code that only a GPU runs, and tokens. It needs no network and
    less than two minutes, and it forecasts the time of an image of each published model.

    The exit code is 1 if the package itself does not work, or a check failed, otherwise 0.

    \b
    Examples:
      mlx-janus doctor
      mlx-janus doctor --json
      mlx-janus doctor --check --report report.md
    """
    with contextlib.suppress(ImportError):  # ``diagnose`` reports a missing MLX
        import_mlx()
    if check:
        return _run_checks(parts, model, report, as_json)
    from .diagnosis import diagnose

    findings = diagnose()
    if as_json:
        facts = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        _print_findings(findings)
    return int(any(finding.status == "fail" for finding in findings))


def _run_checks(parts: Sequence[str], model: str | None, report: str | None, as_json: bool) -> int:
    """Run the self-check, print its results, and return the exit code."""
    import_mlx()
    from ..selfcheck.report import facts, line, markdown, summary
    from ..selfcheck.run import PARTS, run_parts
    from .diagnosis import describe_machine

    file = None
    if report is not None:
        file = output_file(report, "report.md")
        check_writable(file, "--report")  # fail now, not after the checks
    checks = []
    for check in run_parts(parts or PARTS, model, report=lambda step: note(f"Checking {step} ...")):
        checks.append(check)
        if not as_json:
            click.echo(line(check))
    if as_json:
        click.echo(json.dumps([facts(check) for check in checks], indent=1, ensure_ascii=False))
    else:
        click.echo(f"\n{summary(checks)}")
    if file:
        file.write_text(markdown(checks, describe_machine()), encoding="utf-8")
        note(f"Wrote {file}.")
    return int(any(check.status == "fail" for check in checks))


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
