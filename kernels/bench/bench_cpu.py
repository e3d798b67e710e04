"""Times the CPU operator beside transformers and ONNX Runtime, and holds it against the machine's limits.

    python kernels/bench/bench_cpu.py --quick
    python kernels/bench/bench_cpu.py --out docs/benchmarks/cpu-kernels.json
    python kernels/bench/bench_cpu.py --table docs/benchmarks/cpu-kernels.json > docs/benchmarks/cpu-kernels.md

Needs g++ for the limits. Nothing else should run meanwhile.
"""

import json as jsonlib
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, its folder is there instead
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer
from rich.console import Console
from rich.table import Table

from kernels.bench.cases import Shape
from kernels.bench.claims import claims
from kernels.bench.limits import Limits
from kernels.bench.measure import Measurement, Plan
from kernels.bench.table import error_rows, markdown, sections
from modes_cli.doctor import diagnose
from modes_cli.runtime import kernels

SHAPES = ["1024x384x64x8", "2048x768x128x8"]
DTYPES = ["float32", "bfloat16"]
TOKENS = [1, 8, 64, 512, 2048]
RATIOS = [0.0, 0.5, 0.88]
QUICK = {"shapes": SHAPES[:1], "tokens": [1, 512], "ratios": [0.0, 0.88], "threads": [1]}  # under a minute


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="The first shape, 1 and 512 tokens, 1 thread; under a minute.")
    ] = False,
    shape: Annotated[list[str] | None, typer.Option(help="HxIxExK; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a call; repeatable.")] = None,
    skip_ratio: Annotated[list[float] | None, typer.Option(min=0, max=0.999, help="Repeatable; 0 is always measured.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable; 1 and all cores unless given.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed calls of every row.")] = 15,
    row_limit: Annotated[float, typer.Option(help="Seconds; rows that would take longer in all are left out.")] = 90,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here, too.")] = None,
    table: Annotated[Path | None, typer.Option(help="Measure nothing: the markdown page of this JSON on stdout.")] = None,
) -> None:
    """Time the CPU operator beside transformers and ONNX Runtime."""
    if table is not None:
        print(markdown(jsonlib.loads(table.read_text("utf-8"))), end="")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    full = {"shapes": SHAPES, "tokens": TOKENS, "ratios": RATIOS, "threads": [1, cores]}
    defaults: dict[str, Any] = QUICK if quick else full
    if unknown := set(dtype or ()) - set(DTYPES):
        raise typer.BadParameter(f"`{unknown.pop()}` is not one of {', '.join(DTYPES)}", param_hint="--dtype")
    try:
        shapes = [Shape.parse(text) for text in shape or defaults["shapes"]]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shape") from None
    cache = _last_cache()
    plan = Plan(
        shapes=shapes,
        dtypes=dtype or DTYPES,
        tokens=sorted(set(tokens or defaults["tokens"])),
        ratios=sorted({0.0, *(skip_ratio or defaults["ratios"])}),
        threads=sorted(set(threads or defaults["threads"])),
        repetitions=repetitions,
        row_limit=row_limit,
        cache=cache,
    )
    limits = Limits()
    measured = Measurement(plan, limits, lambda text: print(text, file=sys.stderr, flush=True))
    measured.run()
    machine = diagnose()
    record = {
        "command": " ".join(["kernels/bench/bench_cpu.py", *_without_paths(sys.argv[1:])]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": machine["devices"][0]["detail"].rpartition(", ")[0],
            "cores": cores,
            "isa": kernels.isa(),
            "last_cache": cache,
        },
        "versions": _versions(machine["versions"]),
        "repetitions": repetitions,
        "limits": limits.rows(),
        "rows": measured.rows,
        "errors": measured.errors,
        "claims": claims(measured.rows, measured.errors),
        "left_out": measured.left_out,
    }
    text = jsonlib.dumps(record, indent=1)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", "utf-8")
    if json:
        print(jsonlib.dumps(record))
    else:
        _show(record)


def _show(record: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 180)
    errors = [["largest error", *row] for row in error_rows(record["errors"])]
    for section in sections(record):
        shown = Table(title=section.title, title_justify="left", box=None, pad_edge=False)
        for column in section.header:
            shown.add_column(column, justify="left" if column == "claim" else "right")
        for row in section.rows:
            shown.add_row(*row)
        console.print(shown, "")
    for row in errors:
        console.print(" ".join(row), markup=False, highlight=False)


def _without_paths(arguments: list[str]) -> list[str]:
    """The command line for the record, less where its result went."""
    kept = []
    rest = iter(arguments)
    for word in rest:
        if word == "--out":
            next(rest, None)
        elif word != "--json" and not word.startswith("--out="):
            kept.append(word)
    return kept


def _versions(installed: dict[str, str | None]) -> dict[str, str | None]:
    ort = installed["onnxruntime-gpu"] or installed["onnxruntime"]
    return {name: installed[name] for name in ("modes", "python", "torch", "transformers", "onnx")} | {"onnxruntime": ort}


def _last_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=32 << 20)


if __name__ == "__main__":
    typer.run(main)
