"""Running the measuring in processes of their own: a kernel that hangs or breaks the device costs its own rows, not the run.

The measuring process appends a line of JSON for all it begins and all it has found. Where no line comes for a while, or it
ends badly, what it began last is to blame: that runtime is left out, and another process goes on with what is not done.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kernels.bench.cases import Shape
from kernels.bench.measure_gpu import GpuMeasurement, GpuPlan

POLL = 0.05  # seconds
STARTS = 8  # processes at most

Json = dict[str, Any]


@dataclass
class Found:
    """What all processes told. `errors`: what broke; `left_out`: what was not made for a case."""

    machine: Json = field(default_factory=dict)
    limits: Json = field(default_factory=dict)
    rows: list[Json] = field(default_factory=list)
    errors: list[Json] = field(default_factory=list)
    left_out: list[Json] = field(default_factory=list)
    done: set[int] = field(default_factory=set)


def supervised(plan: GpuPlan, seconds: float, patience: float, say: Callable[[str], None]) -> Found:
    """Measure a plan within `seconds`; no single step may take longer than `patience`."""
    found, deadline, without = Found(), time.monotonic() + seconds, set(plan.without)
    for _ in range(STARTS):
        rest = replace(plan, tokens=[t for t in plan.tokens if t not in found.done], without=frozenset(without))
        if not rest.tokens:
            return found
        last, why = _one_process(rest, found, deadline, patience, say)
        if why is None:
            return found
        # What was told of a case that is not done is told again.
        found.rows = [row for row in found.rows if row["tokens"] in found.done]
        found.left_out = [row for row in found.left_out if row["tokens"] in found.done]
        found.errors.append({**last, "reason": why})
        say(f"{last}: {why}")
        if "runtime" not in last or time.monotonic() > deadline:
            break
        without.add(last["runtime"])
    missing = [t for t in plan.tokens if t not in found.done]
    found.errors += [{"tokens": t, "reason": "not measured: no time left, or too much broke"} for t in missing]
    return found


def _one_process(
    plan: GpuPlan, found: Found, deadline: float, patience: float, say: Callable[[str], None]
) -> tuple[Json, str | None]:
    """What it began last, and what was wrong; None if all went well."""
    last: Json = {}
    with tempfile.TemporaryDirectory() as folder:
        lines, output = Path(folder) / "lines", Path(folder) / "output"
        lines.touch()
        command = [sys.executable, "-m", "kernels.bench.supervise", _as_text(plan), str(lines)]
        with output.open("wb") as written, lines.open() as told:
            process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=written, stderr=subprocess.STDOUT)
            heard = time.monotonic()
            while True:
                ended = process.poll() is not None  # before reading: what it wrote last is read, too
                while line := told.readline():
                    heard = time.monotonic()
                    last = _take(json.loads(line), found, last, say)
                now = time.monotonic()
                if ended:
                    break
                if now > deadline or now - heard > patience:
                    process.kill()
                    process.wait()
                    return last, "no time left" if now > deadline else f"stopped: nothing happened for {patience:g} s"
                time.sleep(POLL)
        if process.returncode == 0:
            return last, None
        said = output.read_text(errors="replace").strip().splitlines()
        return last, f"the measuring process ended with {process.returncode}: {said[-1] if said else 'no output'}"


def _take(told: Json, found: Found, last: Json, say: Callable[[str], None]) -> Json:
    """Note one line; returns what was begun last."""
    kind, content = told["kind"], told["content"]
    if kind == "start":
        return dict(content)
    if kind == "done":
        found.done.add(content["tokens"])
        say(f"{content['tokens']} tokens measured")
    elif kind == "machine":
        found.machine = content
    elif kind == "limits":
        found.limits = found.limits or content
    elif kind == "row":
        found.rows.append(content)
    elif kind == "left_out":
        found.left_out.append(content)
    else:
        found.errors.append(content)
        say(f"{content}")
    return last


def _as_text(plan: GpuPlan) -> str:
    return json.dumps(asdict(plan) | {"without": sorted(plan.without)})


def _plan(text: str) -> GpuPlan:
    fields = json.loads(text)
    return GpuPlan(**fields | {"shape": Shape(**fields["shape"]), "without": frozenset(fields["without"])})


def main(plan: str, lines: str) -> None:
    """The measuring process."""
    with open(lines, "a", buffering=1) as file:

        def tell(kind: str, content: Json) -> None:
            file.write(json.dumps({"kind": kind, "content": content}) + "\n")

        GpuMeasurement(_plan(plan), tell).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
