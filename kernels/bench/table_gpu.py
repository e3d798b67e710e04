"""A GPU run's JSON as tables on a terminal."""

from collections.abc import Iterator
from typing import Any

from kernels.bench.names import OURS
from kernels.bench.table import Section, answer, milliseconds, number, times_as_fast

Json = dict[str, Any]


def sections(record: Json) -> Iterator[Section]:
    """The layer, a row for each number of tokens and skip ratio; then the claims."""
    rows: list[Json] = record["rows"]
    if rows:
        yield _layer(rows)
    if record["claims"]:
        found = [[c["claim"], number(c["measured"]), c["wanted"], answer(c["holds"])] for c in record["claims"]]
        yield Section("What is claimed", ["claim", "measured", "wanted", "holds"], found)


def _layer(rows: list[Json]) -> Section:
    """Milliseconds; in brackets how many times as fast ours is. A wrong output has no time."""
    peers = list(dict.fromkeys(row["runtime"] for row in rows if row["runtime"] != OURS))
    cases = list(dict.fromkeys((row["tokens"], row["skip_ratio"]) for row in rows))
    table = []
    for tokens, ratio in cases:
        case = {row["runtime"]: row for row in rows if (row["tokens"], row["skip_ratio"]) == (tokens, ratio)}
        ours = case.get(OURS)
        cells = [str(tokens), f"{ratio:.0%}", *_ours(ours)]
        table.append([*cells, *(_peer(case.get(peer), ours) for peer in peers)])
    header = ["T", "skipped", OURS, "path", "FLOP/s", "bytes/s", *peers]
    return Section(f"One layer, {rows[0]['dtype']}, ms; shares of the measured limits", header, table)


def _ours(row: Json | None) -> list[str]:
    if row is None:
        return ["-"] * 4
    if not row["right"]:
        return [f"wrong by {row['error']:.1e}", row["path"] or "-", "-", "-"]
    return [milliseconds(row), row["path"] or "-", f"{row['flops_fraction']:.0%}", f"{row['bandwidth_fraction']:.0%}"]


def _peer(row: Json | None, ours: Json | None) -> str:
    if row is None:
        return "-"
    if not row["right"]:
        return f"wrong by {row['error']:.1e}"
    faster = f" ({times_as_fast(row['seconds'] / ours['seconds'])})" if ours is not None and ours["right"] else ""
    return milliseconds(row) + faster


def as_text(section: Section) -> str:
    """Columns under each other; the first to the left, the others to the right."""
    lines = [section.header, *section.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(section.header))]
    cells = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join([section.title, *("  ".join(line).rstrip() for line in cells)])
