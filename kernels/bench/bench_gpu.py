"""Times the CUDA operator beside PyTorch, transformers and Triton, and holds it against the machine's limits.

    python kernels/bench/bench_gpu.py --quick
    python kernels/bench/bench_gpu.py --json gpu.json

Nothing else should use the GPU meanwhile. Exits with 1 when our operator broke or computed something else.
"""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, its folder is there instead
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from kernels.bench.cases import Shape
from kernels.bench.claims_gpu import claims
from kernels.bench.measure_gpu import SIDE, SIZE, GpuPlan
from kernels.bench.names import OURS
from kernels.bench.supervise import supervised
from kernels.bench.table_gpu import as_text, sections

SHAPE = "2048x768x128x8"
TOKENS = [1, 8, 64, 512, 2048, 8192, 32768]
RATIOS = [0.0, 0.5, 0.75, 0.88]
LEAST_REPETITIONS = 2  # for quartiles
PATIENCE = 60.0  # seconds of one step; the first calls of Triton compile

Json = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables, write the JSON."""
    asked = _parser().parse_args(arguments)
    plan = GpuPlan(
        shape=asked.shape,
        dtype=asked.dtype,
        tokens=asked.tokens or ([1, 512] if asked.quick else TOKENS),
        ratios=[0.0, 0.88] if asked.quick else RATIOS,
        repetitions=max(LEAST_REPETITIONS, asked.repetitions or (5 if asked.quick else 15)),
        device=asked.device,
        side=SIDE if asked.device == "cuda" else 256,
        size=SIZE if asked.device == "cuda" else 1 << 24,
    )
    found = supervised(plan, asked.seconds, asked.patience, lambda text: print(text, file=sys.stderr, flush=True))
    record: Json = {
        "date": datetime.now(UTC).date().isoformat(),
        "shape": str(plan.shape),
        "machine": found.machine,
        "versions": versions(),
        "repetitions": plan.repetitions,
        "limits": found.limits,
        "rows": found.rows,
        "errors": found.errors,
        "left_out": found.left_out,
        "claims": claims(found.rows, None),
    }
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for section in sections(record):
        print(as_text(section), end="\n\n")
    return int(broke(record))


def broke(record: Json) -> bool:
    """Whether our operator failed somewhere, was wrong, or was not measured. A peer that fails is only reported."""
    ours = [row for row in record["rows"] if row["runtime"].startswith(OURS)]
    failed = [error for error in record["errors"] if error.get("runtime", OURS).startswith(OURS)]
    return bool(failed) or not ours or not all(row["right"] for row in ours)


def versions() -> dict[str, str | None]:
    """Of what takes part; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "onnx", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time the CUDA operator beside PyTorch, transformers and Triton.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here")
    parser.add_argument("--quick", action="store_true", help="1 and 512 tokens, nothing and 88%% skipped")
    parser.add_argument("--shape", type=Shape.parse, default=Shape.parse(SHAPE), metavar="HxIxExK")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--tokens", type=int, action="append", metavar="T", help="repeatable")
    parser.add_argument("--repetitions", type=int, metavar="N", help="timed calls of every row; 15 unless given")
    parser.add_argument("--seconds", type=float, default=300, help="for everything")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for one step before it is stopped")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the benchmark out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
