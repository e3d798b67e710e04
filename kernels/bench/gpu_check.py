"""All of gpu_check.sh behind its first checks: build, test and measure within one deadline, whatever breaks.

Each part is a process of its own with a limit of its own; one that hangs is stopped with all that it started, one that
breaks is reported, and the next one runs. Only the standard library is imported here.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kernels.bench import gpu_parts
from kernels.bench.gpu_parts import Context, Part
from kernels.bench.table import Section
from kernels.bench.table_gpu import as_text

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 520.0
# What each part needs beside torch. The name to install is the same, but for the first.
NEEDED = ("pytest", "hypothesis", "transformers", "triton", "pydantic", "typer", "rich", "safetensors", "onnx", "onnxruntime")

Json = dict[str, Any]


def main() -> int:
    """Run all parts, write the JSON, print the tables."""
    started = time.monotonic()
    context = Context(ROOT, started + float(os.environ.get("MODES_CHECK_SECONDS", SECONDS)))
    record: Json = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "missing": [name for name in NEEDED if importlib.util.find_spec(name) is None],
    }
    if record["missing"]:
        say(f"not installed: {', '.join(record['missing'])}")
    parts = run_parts(gpu_parts.PARTS, context, say)
    record |= {"parts": [part.summary() for part in parts], "seconds": time.monotonic() - started}
    for part in parts:
        record |= part.results
    record["claims"] = claims(record)
    written = write(record)
    for section in sections(record):
        print(as_text(section), end="\n\n")
    print(f"written: {written.relative_to(ROOT)}")
    return int(not all(part.ok for part in parts))


def run_parts(
    parts: list[tuple[str, float, float, Callable[[Context, Part], None]]], context: Context, say: Callable[[str], None]
) -> list[Part]:
    """Each: name, seconds it may take, seconds it should have at least, and what it does.

    A part may use what others have left over, but not what those after it need.
    """
    done: list[Part] = []
    for i, (name, most, _, function) in enumerate(parts):
        reserved = sum(least for _, _, least, _ in parts[i + 1 :])
        left = context.deadline - time.monotonic()
        part = Part(name, time.monotonic() + max(5.0, min(most, left - reserved)))
        say(f"{name} ...")
        started = time.monotonic()
        if left <= 0:
            part.fail("no time left")
        else:
            try:
                function(context, part)
            except Exception as error:  # the other parts go on
                part.fail(f"{type(error).__name__}: {error}")
        part.seconds = time.monotonic() - started
        say(f"{name}: {'ok' if part.ok else 'FAILED'} in {part.seconds:.0f} s{part.said()}")
        done.append(part)
        context.ok[name] = part.ok
    return done


def claims(record: Json) -> list[Json]:
    """The layer's and the decoder's, from what was measured; none where reading it fails."""
    from kernels.bench.claims_gpu import claims as found

    return found(record.get("layer", {}).get("rows", []), record.get("decoder"))


def sections(record: Json) -> list[Section]:
    """What is printed last: the layer, the decoder, the claims, the parts."""
    from kernels.bench import table_gpu

    rows = record.get("layer", {}).get("rows", [])
    tables = list(table_gpu.sections({"rows": rows, "claims": record["claims"]}))
    if cases := record.get("decoder", {}).get("cases"):
        header = ["phase", "batch", "runtime", "skipped", "ms", "speed-up", "of the limit"]
        lines = [
            [c["phase"], str(c["batch"]), c["runtime"], f"{c['skip_ratio']:.1%}", f"{c['seconds'] * 1e3:.2f}",
             f"{c['speedup']:.2f}x", f"{c['limit_fraction']:.0%}"] for c in cases
        ]  # fmt: skip
        tables.insert(len(tables) - 1, Section("A whole decoder", header, lines))
    lines = [
        [p["part"], "ok" if p["ok"] else "FAILED", f"{p['seconds']:.0f} s", "; ".join(p["said"])[:160]] for p in record["parts"]
    ]
    return [*tables, Section("Parts", ["part", "", "time", "said"], lines)]


def write(record: Json) -> Path:
    """docs/benchmarks/gpu-<name>.json, and a copy under $OUT."""
    name = re.sub(r"[^a-z0-9]+", "-", record["machine"]["gpu"].lower()).strip("-")
    target = ROOT / "docs" / "benchmarks" / f"gpu-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    if out := os.environ.get("OUT"):
        shutil.copy(target, Path(out) / target.name)
    return target


def machine() -> Json:
    """The first GPU, its driver and the compiler."""
    fields = ("name", "compute_cap", "driver_version", "memory.total")
    values = _said("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").splitlines()[0].split(", ")
    release = re.search(r"release (\S+?),", _said("nvcc", "--version"))
    found = dict(zip(("gpu", "capability", "driver", "memory"), values, strict=False))
    return found | {"nvcc": release[1] if release else "unknown", "cores": os.cpu_count(), "python": sys.version.split()[0]}


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def say(text: str) -> None:
    """What goes on, while it goes on."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
