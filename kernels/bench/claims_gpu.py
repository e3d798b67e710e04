"""What the CUDA kernels are said to reach, held against a run. Ratios and limits are of one run and one machine."""

from collections.abc import Iterable, Iterator
from typing import Any

from kernels.bench.claims import at_least, has, speedup
from kernels.bench.names import GROUPED_MM, OURS, TRANSFORMERS, TRITON

Json = dict[str, Any]
MOST_SKIPPED = 0.88


def claims(rows: Iterable[Json], decoder: Json | None) -> list[Json]:
    """Each: `claim`, `measured`, `wanted`, `holds`; None for the first and last where this run has not measured it.

    Rows with a wrong output count as not measured. `decoder`: the bench.json of `modes bench --shape`.
    """
    right = [row for row in rows if row["right"]]
    return [*_many_tokens(right), *_few_tokens(right), *_whole_decoder(decoder)]


def _one(rows: list[Json], runtime: str, tokens: int, ratio: float) -> Json | None:
    return next((row for row in rows if has(row, {"runtime": runtime, "tokens": tokens, "skip_ratio": ratio})), None)


def _value(row: Json | None, field: str) -> float | None:
    return None if row is None else float(row[field])


def _many_tokens(rows: list[Json]) -> Iterator[Json]:
    full, most = _one(rows, OURS, 8192, 0), _one(rows, OURS, 8192, MOST_SKIPPED)
    yield at_least("layer, 8192 tokens: share of the matmul ceiling", _value(full, "flops_fraction"), 0.60)
    for peer in (GROUPED_MM, TRANSFORMERS, TRITON):
        yield at_least(f"layer, 8192 tokens: over {peer}", speedup(full, _one(rows, peer, 8192, 0)), 1.0)
    share = _value(most, "bandwidth_fraction")
    yield at_least("layer, 8192 tokens, 88% skipped: share of the copy bandwidth", share, 0.75)
    yield at_least("layer, 8192 tokens, 88% skipped: over our own unskipped", speedup(most, full), 1.9)
    longer = speedup(_one(rows, OURS, 32768, MOST_SKIPPED), _one(rows, OURS, 32768, 0))
    yield at_least("layer, 32768 tokens, 88% skipped: over our own unskipped", longer, 5.0)


def _few_tokens(rows: list[Json]) -> Iterator[Json]:
    for tokens in (1, 8):
        for ratio in (0, MOST_SKIPPED):
            share = _value(_one(rows, OURS, tokens, ratio), "bandwidth_fraction")
            yield at_least(f"layer, {tokens} tokens, {ratio:.0%} skipped: share of the copy bandwidth", share, 0.70)


def _whole_decoder(decoder: Json | None) -> Iterator[Json]:
    cases: list[Json] = [] if decoder is None else decoder["cases"]

    def find(phase: str, batch: int | None, runtimes: tuple[str, ...], ratio: float) -> Json | None:
        """The first of the runtimes that was measured, at the skip ratio nearest to this one."""
        for runtime in runtimes:
            same = [c for c in cases if (c["phase"], c["runtime"]) == (phase, runtime) and batch in (None, c["batch"])]
            near = min(same, key=lambda c: abs(c["skip_ratio"] - ratio), default=None)
            if near is not None and abs(near["skip_ratio"] - ratio) <= 0.03:
                return near
        return None

    ours = "transformers+modes (graph)", "transformers+modes"
    wanted: tuple[tuple[str, int | None, str, float], ...] = (
        ("prefill", None, "transformers", 2.16),
        ("prefill", None, "transformers (graph)", 2.16),
        ("decode", 1, "transformers (graph)", 1.26),
        ("decode", 8, "transformers (graph)", 1.26),
    )
    for phase, batch, peer, least in wanted:
        name = f"decoder, {phase}" + ("" if batch is None else f", batch {batch}")
        most = find(phase, batch, ours, MOST_SKIPPED)
        share = f" ({most['limit_fraction']:.0%} of the limit)" if most else ""
        yield at_least(f"{name}, 88% skipped: over {peer}{share}", speedup(most, find(phase, batch, (peer,), 0)), least)
