"""Fuzzing of every parser that reads what others wrote: executions and defects of each.

    python -m tools.trust [--long] fuzz

The targets are those of tests/fuzz. The long form gives each a minute of atheris, with coverage; it must be installed. The
short one is the plain loop with a fixed number of inputs, the same each time.
"""

import tempfile
from pathlib import Path
from typing import Any

from tests.fuzz import runs
from tests.fuzz.engine import TARGETS

SECONDS, EXECUTIONS = 60.0, 300


def measure(long: bool, targets: tuple[str, ...] = TARGETS) -> dict[str, Any]:
    """One run of each target.

    Raises:
        RuntimeError: the long form without atheris.
    """
    if long and not runs.has_atheris():
        raise RuntimeError("the long form needs atheris: `pip install 'modes[fuzz]'`")
    limits = runs.Limits("atheris", SECONDS) if long else runs.Limits("plain", executions=EXECUTIONS)
    with tempfile.TemporaryDirectory(prefix="modes-fuzz-run-") as name:
        runs.prepare_files(Path(name))
        reports = {target: runs.run(target, limits, Path(name)) for target in targets}
    return {"engine": limits.engine, "seconds_each": limits.seconds if long else None, "targets": reports}


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """For a table: what was fuzzed, and what came out."""
    reports = result["targets"].values()
    total, defects = sum(report["executions"] for report in reports), sum(len(report["defects"]) for report in reports)
    each = [
        (f"`{report['target']}`", f"{report['executions']:,} executions, {len(report['defects'])} defects")
        for report in reports
    ]
    return [("parsers fuzzed", f"{len(each)}"), ("executions", f"{total:,}"), ("defects", f"{defects}"), *each]


def is_sound(result: dict[str, Any]) -> bool:
    """Whether every target was tried, something of each accepted, and no defect found."""
    reports = result["targets"]
    return set(reports) == set(TARGETS) and all(one["accepted"] and not one["defects"] for one in reports.values())
