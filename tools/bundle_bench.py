"""docs/benchmarks/bundle-digits.json and .md from the bench.json of some bundles, each measured more than once.

    python -m tools.bundle_bench 'auto=b1/bench.json,b2/bench.json' 'modes=c1/bench.json,c2/bench.json'

A name stands for how the thresholds were searched: `search --target 0.75`, or the same with `--policy NAME`.
"""

import argparse
from pathlib import Path
from typing import Any

from modes_cli import files
from modes_cli.artifacts import Bench
from modes_cli.artifacts.bench import Case
from modes_cli.run_folder import read_json

OUTPUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "bundle-digits.json"
OURS, PLAIN, STOCK = "onnxruntime+modes", "onnxruntime", "onnxruntime MoE"
INTRODUCTION = """\
# A bundle beside ONNX Runtime's own operators

`digits` at a target of 0.75, prefill with the vision tower and decode, by the commands in
[bundle-digits.json](bundle-digits.json), which has all numbers, transformers' among them. MoE is the bundle's own decoder
graph with com.microsoft.MoE in the place of every `modes::SkipExperts` and of the `modes::Route` before it; before it is timed
its logits are compared with the bundle's at tau = 0. All runtimes have one thread, in one process, in turn; times are medians
in milliseconds. Ratios hold within a run; milliseconds and shares of the limit are those of the machine as it was.

"""
CLOSING = """
Larger layers are in the [kernel benchmark](cpu-kernels.md).
"""


def main() -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(description="bundle-digits.json and .md from bench.json files.")
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE[,FILE...]")
    groups = dict(_group(text) for text in parser.parse_args().runs)
    tree = [
        {"search": name, "commands": commands(name, bench), "bench": bench.model_dump(mode="json")}
        for name, benches in groups.items()
        for bench in benches
    ]
    files.write_bytes(OUTPUT, files.canonical_json(tree).encode())
    files.write_bytes(OUTPUT.with_suffix(".md"), page(groups).encode())
    return 0


def _group(text: str) -> tuple[str, list[Bench]]:
    name, _, paths = text.partition("=")
    return name, [read_json(Path(path), Bench) for path in paths.split(",")]


def commands(name: str, bench: Bench) -> list[str]:
    """What made the numbers."""
    policy = "" if name == "auto" else f" --policy {name}"
    batches = " ".join(f"--batch {batch}" for batch in str(bench.options["batches"]).split(","))
    return [
        "export OMP_NUM_THREADS=1",
        "modes calibrate digits",
        f"modes search --target {bench.options['target']}{policy}",
        "modes export",
        f"modes bench --bundle modes-run/bundle {batches} --repeats {bench.options['repeats']}",
    ]


def page(groups: dict[str, list[Bench]]) -> str:
    """The tables, in markdown."""
    parts = [INTRODUCTION, *(f"{claim(name, benches)}\n" for name, benches in groups.items()), CLOSING]
    for name, benches in groups.items():
        parts.append(f"\n## {title(name)}\n\n")
        parts.append("| phase | batch | skipped | MoE | modes, all experts | modes | over MoE, each run |\n")
        parts.append("| --- | --- | --- | --- | --- | --- | --- |\n")
        rows = {(case.phase, case.batch) for case in benches[0].cases}
        for phase, batch in sorted(rows, key=lambda row: (row[0] != "prefill", row[1])):
            by_name = [{c.runtime: c for c in bench.cases if (c.phase, c.batch) == (phase, batch)} for bench in benches]
            parts.append(f"| {' | '.join([phase, str(batch), *_row(by_name)])} |\n")
    return "".join(parts)


def title(name: str) -> str:
    return "`auto`" if name == "auto" else f"`--policy {name}`"


def claim(name: str, benches: list[Bench]) -> str:
    """What the stock operator's times are to ours, over all runs and batches."""
    found = {phase: over_stock(benches, phase) for phase in ("prefill", "decode")}
    slower = min(map(min, found.values())) > 1
    ranges = (f"{min(ratios):.2f} to {max(ratios):.2f} times in {phase}" for phase, ratios in found.items())
    verdict = "slower everywhere" if slower else "not slower everywhere"
    return f"- {title(name)}, {len(benches)} runs: the stock operator is {verdict}; it takes {' and '.join(ranges)}."


def over_stock(benches: list[Bench], phase: str) -> list[float]:
    """Of every run and batch: the stock operator's time in units of the bundle's own."""
    cases = [case for bench in benches for case in bench.cases if (case.runtime, case.phase) == (OURS, phase)]
    return [case.over_stock for case in cases if case.over_stock is not None]


def _row(runs: list[dict[str, Case]]) -> list[Any]:
    last = runs[-1]
    times = [f"{1e3 * last[name].seconds:.2f}" for name in (STOCK, PLAIN, OURS)]
    return [f"{last[OURS].skip_ratio:.0%}", *times, ", ".join(ratio(run[OURS]) for run in runs)]


def ratio(case: Case) -> str:
    assert case.over_stock is not None
    return f"{case.over_stock:.2f}x"


if __name__ == "__main__":
    raise SystemExit(main())
