"""docs/benchmarks/bundle-quantised.json and .md: whole models with quantised experts beside the same in float32.

    python -m tools.bundle_quantised digits float32=run/bundle int8=run-int8/bundle int4=run-int4/bundle

Bundles of one model, the first of them what the others are compared with. All are open in one process with one thread, and
are timed in turn. Each has its own thresholds, and all must have been searched for the same target. The rows with all experts
compute the same pairs in every bundle. A model's numbers take the place of those it had; other models' stay.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from modes_cli import files
from modes_cli.benchmark.cases import DECODE_STEPS, Timed, measure_rounds, ort_cases
from modes_cli.benchmark.machine import cpu_name
from modes_cli.data import open_source
from modes_cli.errors import BadOption
from modes_cli.options import evaluation_data
from modes_cli.progress import Silent
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.timing import median

OUTPUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "bundle-quantised.json"
BATCHES = (1, 8)
INTRODUCTION = """\
# Whole models with quantised experts

Bundles of one model whose experts are in float32, int8 and int4, by the commands in
[bundle-quantised.json](bundle-quantised.json). All are open in one process with one thread and are timed in turn, as
[tools/bundle_quantised.py](../../tools/bundle_quantised.py) does it; times are medians in milliseconds of processor time. Each
bundle has its own thresholds, searched for the same target; the rows with nothing skipped compute the same pairs in every
bundle. Everything but the experts is float32 in all of them, so a model gains less than its experts do: those alone are in
[cpu-quantised.json](cpu-quantised.json).
"""


def main() -> int:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description="Times of bundles with quantised experts, beside the same in float32.")
    parser.add_argument("model", help="what the page calls it")
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    asked = parser.parse_args()
    pairs = [text.partition("=") for text in asked.bundles]
    found = measured({name: Path(path) for name, _, path in pairs}, asked.repeats)
    tree = json.loads(asked.output.read_text("utf-8")) if asked.output.exists() else {}
    tree[asked.model] = {"commands": commands(asked.model, sorted(name for name, *_ in pairs), asked.repeats), **found}
    files.write_bytes(asked.output, files.canonical_json(tree).encode())
    files.write_bytes(asked.output.with_suffix(".md"), page(tree).encode())
    return 0


def commands(model: str, names: list[str], repeats: int) -> list[str]:
    """What made the numbers."""
    made, data, policy = ["export OMP_NUM_THREADS=1"], "", ""
    if model.startswith("wide"):  # tools/wide_digits.py: what a random model is calibrated on hardly matters
        made.append(f"python -m tools.wide_digits {model}")
        data, policy = " --data digits --samples 4", " --policy modes"
    for name in names:
        quantize, run = "" if name == "float32" else f" --quantize {name}", f" --run {model}-{name}"
        made += [
            f"modes calibrate {model}{data}{quantize}{run}",
            f"modes search --target 0.75{policy}{run}",
            f"modes export{run}",
        ]
    bundles = " ".join(f"{name}={model}-{name}/bundle" for name in names)
    return [*made, f"python -m tools.bundle_quantised {model} {bundles} --repeats {repeats}"]


def measured(folders: dict[str, Path], repeats: int) -> dict[str, Any]:
    """Machine, bundles and cases. Raises BadOption if the bundles are not of one model and one target."""
    models = {name: OrtModel(folder, "cpu", threads=1) for name, folder in folders.items()}
    bundles = [model.bundle for model in models.values()]
    if len({(bundle.model.digest, bundle.target) for bundle in bundles}) > 1:
        raise BadOption("these bundles are of different models or targets", hint="export each with the same `--target`")
    source = open_source(evaluation_data("digits", None, None, None, 0, (None, None, None)))
    samples = list(islice(source, max(BATCHES)))
    timings: list[tuple[str, Timed]] = []
    for size in BATCHES:
        for name, model in models.items():
            timings += [(name, replace(case, measure=_processor(case))) for case in ort_cases(model, samples[:size])]
    measure_rounds([case for _, case in timings], repeats, Silent())
    first = next(iter(folders))
    cases = [
        {
            "bundle": name, "phase": case.phase, "batch": case.batch, "skipping": case.runtime.endswith("+modes"),
            "skip_ratio": case.skip_ratio, "seconds": median(case.seconds),
        }
        for name, case in timings
    ]  # fmt: skip
    base = {_row(case): case["seconds"] for case in cases if case["bundle"] == first}
    return {
        "machine": {"cpu": cpu_name(), "threads": 1},
        "repeats": repeats,
        "baseline": first,
        "target": bundles[0].target,
        "bundles": {
            name: {"policy": model.bundle.policy, "tau": model.bundle.tau, "weights": _weights(model)}
            for name, model in models.items()
        },
        "cases": [{**case, "speedup": base[_row(case)] / case["seconds"]} for case in cases],
    }


def _processor(case: Timed) -> Callable[[], float]:
    """The same by the processor time of this thread, the only one that computes: other programs disturb it less."""
    steps = DECODE_STEPS if case.phase == "decode" else 1

    def measure() -> float:
        started = time.thread_time()
        case.measure()
        return (time.thread_time() - started) / steps

    return measure


def _row(case: dict[str, Any]) -> tuple[Any, ...]:
    return case["phase"], case["batch"], case["skipping"]


def _weights(model: OrtModel) -> int:
    """Bytes."""
    return sum(file.bytes for file in model.bundle.files if file.path.startswith("model-"))


def page(tree: dict[str, Any]) -> str:
    """The tables, in markdown, and what they say."""
    parts = [INTRODUCTION]
    for model, found in sorted(tree.items()):
        names = sorted(found["bundles"], key=lambda name: (name != found["baseline"], name))
        cases = {(*_row(case), case["bundle"]): case for case in found["cases"]}
        parts.append(f"\n## {model}\n\n")
        for name in names[1:]:
            decode = [c["speedup"] for c in found["cases"] if (c["bundle"], c["phase"]) == (name, "decode")]
            size = found["bundles"][name]["weights"] / found["bundles"][names[0]]["weights"]
            speed = f"{min(decode):.2f} to {max(decode):.2f} times as fast as {names[0]}"
            parts.append(
                f"{name}: decode is {speed}; the file of its weights, unquantised ones included, is {size:.2f} as large.\n"
            )
        heads = ["phase", "batch", "skipped", *names, *(f"{name}, faster" for name in names[1:])]
        parts.append(f"\n| {' | '.join(heads)} |\n| {' | '.join('---' for _ in heads)} |\n")
        for row in dict.fromkeys(_row(case) for case in found["cases"]):
            of = [cases[*row, name] for name in names]
            cells = [row[0], str(row[1]), " / ".join(dict.fromkeys(f"{case['skip_ratio']:.0%}" for case in of))]
            cells += [f"{1e3 * case['seconds']:.2f}" for case in of] + [f"{case['speedup']:.2f}x" for case in of[1:]]
            parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
