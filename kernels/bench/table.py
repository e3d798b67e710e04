"""A run's JSON as tables: in markdown for docs/benchmarks, and on a terminal."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernels.bench.claims import Rows
from kernels.bench.names import MOE, OURS, QMOE

Json = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """One table."""

    title: str
    header: list[str]
    rows: list[list[str]]


def sections(record: Json) -> Iterator[Section]:
    """A table for each shape, dtype and number of threads; then the claims."""
    rows = Rows(record["rows"], record["errors"])
    fields = ("hidden", "intermediate", "experts", "top_k", "dtype", "threads")
    tables: dict[tuple[Any, ...], list[Json]] = {}
    for row in rows.all:
        if row["runtime"] == OURS:
            tables.setdefault(tuple(row[field] for field in fields), []).append(row)
    for values, cases in tables.items():
        at = dict(zip(fields, values, strict=True))
        yield _times(rows, at, sorted({row["tokens"] for row in cases}), sorted({row["skip_ratio"] for row in cases}))
    if record["claims"]:
        checked = [[c["claim"], number(c["measured"]), c["wanted"], answer(c["holds"])] for c in record["claims"]]
        yield Section("What is claimed: H=1024, 1 thread", ["claim", "measured", "wanted", "holds"], checked)


def _times(rows: Rows, at: Json, counts: list[int], ratios: list[float]) -> Section:
    """Milliseconds; in brackets how many times as fast as transformers' best with nothing skipped."""
    sizes = f"H={at['hidden']} I={at['intermediate']} E={at['experts']} top-{at['top_k']}"
    title = f"{sizes}, {at['dtype']}, {count(at['threads'], 'thread')}"
    stock, stock_dtype = (MOE, "float32") if at["dtype"] == "float32" else (QMOE, "float16/int8")
    skipping = [ratio for ratio in ratios if ratio > 0]
    most = max(skipping, default=None)
    header = ["T", "transformers", stock, OURS, "of the limit", *(f"{OURS} at {ratio:.0%}" for ratio in skipping)]
    if most is not None:
        header += ["of the limit", f"transformers at {most:.0%}", f"{stock} at {most:.0%}"]
    table = []
    for tokens in counts:
        case = at | {"tokens": tokens}
        stock_case = case | {"dtype": stock_dtype}
        base = rows.transformers(**case, skip_ratio=0)
        full = rows.one(OURS, **case, skip_ratio=0)
        cells = [str(tokens), _peer(base, None), _cell(rows.one(stock, **stock_case, skip_ratio=0), base)]
        cells += [_cell(full, base), _limit(full)]
        cells += [_cell(rows.one(OURS, **case, skip_ratio=ratio), base) for ratio in skipping]
        if most is not None:
            cells += [_limit(rows.one(OURS, **case, skip_ratio=most))]
            cells += [_peer(rows.transformers(**case, skip_ratio=most, dropped=True), base)]
            cells += [_cell(rows.one(stock, **stock_case, skip_ratio=most), base)]
        table.append(cells)
    return Section(title, header, table)


def _cell(row: Json | None, base: Json | None) -> str:
    if row is None:
        return "-"
    return milliseconds(row) + (f" ({times_as_fast(base['seconds'] / row['seconds'])})" if base is not None else "")


def _peer(row: Json | None, base: Json | None) -> str:
    """transformers' fastest, with the name of its implementation."""
    if row is None:
        return "-"
    return f"{_cell(row, base)} {row['runtime'].removeprefix('transformers ').removesuffix(', dropped')}"


def milliseconds(row: Json) -> str:
    ms = row["seconds"] * 1e3
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}"


def times_as_fast(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def _limit(row: Json | None) -> str:
    """The nearer of the two limits."""
    if row is None:
        return "-"
    if row["flops_fraction"] >= row["bandwidth_fraction"]:
        return f"{row['flops_fraction']:.0%} FLOP/s"
    return f"{row['bandwidth_fraction']:.0%} read"


def count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value < 0.01 else f"{value:.2f}"


def answer(holds: bool | None) -> str:
    return "not measured" if holds is None else "yes" if holds else "no"


def markdown(record: Json) -> str:
    """The page for docs/benchmarks."""
    machine, versions = record["machine"], record["versions"]
    limits = "; ".join(_limit_text(limit) for limit in record["limits"])
    lines = [
        "# The CPU operator beside others",
        "",
        f"Made by `{record['command']}` on {record['date']}: {machine['cpu']}, {count(machine['cores'], 'core')}, "
        f"{machine['last_cache'] >> 20} MiB last cache, kernels for {machine['isa']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, ONNX Runtime {versions['onnxruntime']}.",
        "",
        f"Milliseconds of one layer, medians of {record['repetitions']}, all runtimes in one process in turn, weights out of "
        "memory and not out of the cache. In brackets: how many times as fast as transformers' fastest implementation with "
        "nothing skipped. Percentages skipped are of (token, expert) pairs; the others then compute the kept pairs only, too.",
        "",
        f"Limits measured in between: {limits}.",
    ]
    for section in sections(record):
        lines += ["", f"## {section.title}", "", line(section.header), line(["---"] * len(section.header))]
        lines += [line(row) for row in section.rows]
    lines += ["", "## Errors", "", "Largest difference from float64, 64 tokens (batched_mm 8), relative to the largest output."]
    lines += ["", line(["runtime", "dtype", "H", "error"]), line(["---"] * 4)]
    lines += [line(row) for row in error_rows(record["errors"])]
    if record["left_out"]:
        lines += ["", "## Left out", ""]
        lines += [f"- {_left_out(item)}" for item in record["left_out"]]
    return "\n".join(lines) + "\n"


def error_rows(errors: list[Json]) -> list[list[str]]:
    """runtime, dtype, H, largest error over the skip ratios."""
    worst: dict[tuple[str, str, int], float] = {}
    for e in errors:
        key = e["runtime"], e["dtype"], e["hidden"]
        worst[key] = max(worst.get(key, 0.0), e["error"])
    return [[runtime, dtype, str(hidden), f"{error:.1e}"] for (runtime, dtype, hidden), error in worst.items()]


def _limit_text(limit: Json) -> str:
    rate = (
        f"{limit['best'] / 1e9:.0f} GFLOP/s {limit['dtype']}"
        if limit["limit"] == "flops"
        else f"{limit['best'] / 1e9:.1f} GB/s"
    )
    return f"{rate}, {count(limit['threads'], 'thread')}"


def _left_out(item: Json) -> str:
    where = f"{item['runtime']} {item['dtype']}, H={item['hidden']}"
    if "tokens" in item:
        where += f", T={item['tokens']}, {item['skip_ratio']:.0%} skipped, {count(item['threads'], 'thread')}"
    return f"{where}: {item['reason']}"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
