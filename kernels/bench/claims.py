"""What the operator is said to reach, held against a run: at H = 1024, ratios of medians, one thread unless said otherwise."""

from collections.abc import Iterable, Iterator
from typing import Any

from kernels.bench.names import MOE, OURS

HIDDEN = 1024
MOST_SKIPPED = 0.88
# (dtype, tokens): least speed-up over transformers' best with nothing skipped; of ours with nothing and with 88% skipped.
SPEEDUPS = {
    ("float32", 512): (2.0, 6.0),
    ("float32", 1): (1.8, 12.0),
    ("bfloat16", 512): (1.3, 3.0),
    ("bfloat16", 1): (3.0, 15.0),
}
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 6e-3}

Json = dict[str, Any]


class Rows:
    """The rows of one run, without the runtimes whose output was wrong."""

    def __init__(self, rows: Iterable[Json], errors: Iterable[Json]) -> None:
        wrong = {(e["runtime"], e["hidden"], e["dtype"]) for e in errors if not e["right"]}
        self.all = [row for row in rows if (row["runtime"], row["hidden"], row["dtype"]) not in wrong]

    def one(self, runtime: str, **where: Any) -> Json | None:
        """The row of a runtime with these fields, if there is one."""
        return next((row for row in self.all if row["runtime"] == runtime and has(row, where)), None)

    def transformers(self, *, dropped: bool = False, **where: Any) -> Json | None:
        """transformers' fastest."""
        found = [
            row
            for row in self.all
            if row["runtime"].startswith("transformers") and row["runtime"].endswith(", dropped") == dropped and has(row, where)
        ]
        return min(found, key=lambda row: float(row["seconds"]), default=None)


def claims(rows: Iterable[Json], errors: list[Json]) -> list[Json]:
    """Each: `claim`, `measured`, `wanted`, `holds`. What was not measured in this run has None for the first and last."""
    found = Rows(rows, errors)
    return [
        *_against_transformers(found),
        *_against_the_limits(found),
        *_against_onnxruntime(found),
        _two_threads(found, "float32"),
        _two_threads(found, "bfloat16"),
        *_errors(errors),
    ]


def _against_transformers(rows: Rows) -> Iterator[Json]:
    for (dtype, tokens), wanted in SPEEDUPS.items():
        at: Json = {"hidden": HIDDEN, "dtype": dtype, "tokens": tokens, "threads": 1}
        best = rows.transformers(skip_ratio=0, **at)
        for ratio, least in zip((0, MOST_SKIPPED), wanted, strict=True):
            name = f"{dtype} T={tokens}, {ratio:.0%} skipped: over transformers' best, nothing skipped"
            yield at_least(name, speedup(rows.one(OURS, skip_ratio=ratio, **at), best), least)


def _against_the_limits(rows: Rows) -> Iterator[Json]:
    for tokens, field, least, limit in (
        (512, "flops_fraction", 0.65, "FLOP/s"),
        (1, "bandwidth_fraction", 0.85, "read bandwidth"),
    ):
        ours = rows.one(OURS, hidden=HIDDEN, dtype="float32", tokens=tokens, threads=1, skip_ratio=0)
        yield at_least(f"float32 T={tokens}: share of the measured peak {limit}", ours[field] if ours else None, least)


def _against_onnxruntime(rows: Rows) -> Iterator[Json]:
    for ratio, least, counts in ((0, 1.0, (1, 8, 64, 512, 2048)), (MOST_SKIPPED, 2.5, (64, 512, 2048))):
        for tokens in counts:
            at = {"hidden": HIDDEN, "dtype": "float32", "tokens": tokens, "threads": 1, "skip_ratio": ratio}
            name = f"float32 T={tokens}, {ratio:.0%} skipped: over ONNX Runtime's MoE skipping the same"
            yield at_least(name, speedup(rows.one(OURS, **at), rows.one(MOE, **at)), least)


def _two_threads(rows: Rows, dtype: str) -> Json:
    one, two = (rows.one(OURS, hidden=HIDDEN, dtype=dtype, tokens=512, threads=n, skip_ratio=0) for n in (1, 2))
    return at_least(f"{dtype} T=512: 2 threads over 1", speedup(two, one), 1.7)


def _errors(errors: list[Json]) -> Iterator[Json]:
    for dtype, largest in LARGEST_ERROR.items():
        measured = max((e["error"] for e in errors if e["runtime"] == OURS and e["dtype"] == dtype), default=None)
        holds = None if measured is None else measured < largest
        yield {"claim": f"{dtype}: error against float64", "measured": measured, "wanted": f"< {largest:g}", "holds": holds}


def speedup(ours: Json | None, other: Json | None) -> float | None:
    return other["seconds"] / ours["seconds"] if ours and other else None


def at_least(name: str, measured: float | None, least: float) -> Json:
    holds = None if measured is None else measured >= least
    return {"claim": name, "measured": measured, "wanted": f">= {least:g}", "holds": holds}


def has(row: Json, where: Json) -> bool:
    return all(row[field] == value for field, value in where.items())
