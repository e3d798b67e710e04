"""Fuzz targets, one after the other, each in a process of its own.

    python -m tests.fuzz [TARGET...] [--seconds 60] [--executions N] [--engine atheris|plain] [--seed 0] [--out build/fuzz]

Real artifacts to begin from are made in OUT/files first; defects are printed, and are in OUT/TARGET.json, with the input that
shows each. The exit code is 1 if there are any. `atheris` comes with `pip install 'modes[fuzz]'`; `plain` is our own loop
without coverage, which is what the tests use. A number of executions in a new OUT gives the same inputs each time, with either.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.fuzz import runs
from tests.fuzz.engine import ENDLESS, TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the parsers.")
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each target")
    parser.add_argument("--executions", type=int, default=ENDLESS, help="of each target")
    parser.add_argument("--engine", choices=["atheris", "plain"], default="atheris")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    targets = given.targets or list(TARGETS)
    limits = runs.Limits(given.engine, given.seconds, given.executions, given.seed)
    if given.inside:
        runs.inside(targets[0], limits, given.out)
        return 0
    if given.engine == "atheris" and not runs.has_atheris():
        print("atheris is not installed (`pip install 'modes[fuzz]'`); `--engine plain` does without", file=sys.stderr)
        return 2
    out = given.out.resolve()
    runs.prepare_files(out)
    defects = 0
    for target in targets:
        report = runs.run(target, limits, out)
        found = report["defects"]
        print(f"{target}: {report['executions']:,} executions ({given.engine}) in {report['seconds']:.0f} s,", end=" ")
        print(f"{report['accepted']:,} accepted, {report['refused']:,} refused, {len(found)} defects", flush=True)
        for name, shown in found.items():
            print(f"  {name}\n{shown['traceback']}  input: {shown['input']}", flush=True)
        defects += len(found)
    return 1 if defects else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
