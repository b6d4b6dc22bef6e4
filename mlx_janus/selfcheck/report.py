"""Reports of a self-check: lines, a table, JSON and Markdown."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .findings import Check, Status

_STATUSES: tuple[Status, ...] = ("ok", "warn", "fail")


def line(check: Check) -> str:
    """Return a check as a line: its status, part, name, device and precision, and its result."""
    where = ", ".join(word for word in (check.device.upper(), check.precision) if word)
    return f"{check.status:4}  {check.part}: {check.about}{f' ({where})' if where else ''}: " + (
        check.text
    )


def summary(checks: Sequence[Check]) -> str:
    """Return a table of the counts of each status by part and device."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for check in checks:
        counts.setdefault((check.part, check.device.upper()), Counter())[check.status] += 1
    rows = [("part", "device", *_STATUSES)]
    for (part, device), count in counts.items():
        rows.append((part, device, *(str(count[status]) for status in _STATUSES)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def facts(check: Check) -> dict[str, Any]:
    """Return a check for JSON. A deviation that is not finite is null, as JSON has no such number.

    The keys are the fields of ``Check``.
    """
    values = dataclasses.asdict(check)
    deviation = check.deviation
    if deviation is not None and not abs(deviation) < float("inf"):
        values["deviation"] = None
    return values


def markdown(checks: Sequence[Check], machine: Mapping[str, str]) -> str:
    """Return a report to paste into an issue.

    Args:
        checks: all checks.
        machine: facts on the machine and the versions, by their names.
    """
    lines = ["## mlx-janus doctor --check", ""]
    lines += [f"- {name}: {text}" for name, text in machine.items()]
    counts = Counter(check.status for check in checks)
    lines.append(f"- result: {', '.join(f'{counts[status]} {status}' for status in _STATUSES)}")
    lines += ["", "| status | part | check | device | precision | result | reason |"]
    lines.append("|---|---|---|---|---|---|---|")
    # The worst first, since readers of an issue look for faults.
    for check in sorted(checks, key=lambda check: -_STATUSES.index(check.status)):
        cells = (
            check.status,
            check.part,
            check.about,
            check.device.upper(),
            check.precision,
            check.text,
            check.reason,
        )
        escaped = [cell.replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines) + "\n"
