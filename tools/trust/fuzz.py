"""Fuzzing of every parser that reads what others wrote: executions and defects of each.

    python -m tools.trust.fuzz [--long] [--json FILE] [TARGET...]

The targets are those of tests/fuzz. The long form gives each a minute of atheris, with coverage; it must be installed. The
short one is the plain loop with a fixed number of inputs, the same each time.
"""

import argparse
import importlib.metadata
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

import modes_cli
from modes_cli import files
from modes_cli.benchmark.machine import measure_machine
from tests.fuzz import runs
from tests.fuzz.engine import TARGETS

SECONDS, EXECUTIONS = 60.0, 300
OUTPUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "trust-fuzz.json"
COMMAND = "python -m tools.trust.fuzz --long"


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the parsers.")
    parser.add_argument("--long", action="store_true", help="a minute of atheris for each target")
    parser.add_argument("--json", type=Path, help="where the numbers go; with --long: docs/benchmarks/trust-fuzz.json")
    parser.add_argument("targets", nargs="*", help="default: all")
    given = parser.parse_args()
    result = measure(given.long, tuple(given.targets) or TARGETS)
    for name, value in rows(result):
        print(f"{name}: {value}")
    output = given.json or (OUTPUT if given.long else None)
    if output is not None:
        versions = {name: importlib.metadata.version(name) for name in ("atheris", "onnx", "pillow", "pyarrow", "transformers")}
        versions |= {"python": platform.python_version(), "modes": modes_cli.__version__}
        machine = measure_machine(torch.device("cpu")).model_dump(mode="json")
        tree = {"command": COMMAND, "machine": machine, "versions": versions, "result": result}
        files.write_bytes(output, files.canonical_json(tree).encode())
    return 1 if any(report["defects"] for report in result["targets"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
