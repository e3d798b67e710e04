"""The measuring: every runtime of a case in turn, round after round, so that a slow moment of the machine hits all alike.

Calls in turn have different inputs, so that none finds in the cache what the one before it has just read. The number of
inputs is a prime, and no multiple of it goes into a round: after some rounds every runtime has had every input.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.bench.cases import (
    TOLERANCE,
    Layer,
    Routed,
    Shape,
    layers_needed,
    random_layers,
    random_routings,
    reference,
    relative_error,
)
from kernels.bench.limits import Limits
from kernels.bench.ours import FEW_TOKENS, Runtime
from kernels.bench.peers import torch_runtimes
from kernels.bench.peers_ort import Moe, QMoe
from modes_cli.errors import first_line

WARM_UPS = 2
SWEEPS = 3  # thread counts take turns this many times, so that they too are compared over the same stretch of time
LONG_CALL = 0.2  # seconds; above it a switch of threads is too little to warm up after
PAUSE = 0.003  # seconds before a call with several threads: OpenMP's threads spin for a while after the call before
ERROR_TOKENS = 64


@dataclass(frozen=True)
class Plan:
    """What is measured. `dtypes` by torch's names; `row_limit`: seconds that one row may take, all repetitions together."""

    shapes: list[Shape]
    dtypes: list[str]
    tokens: list[int]
    ratios: list[float]
    threads: list[int]
    repetitions: int
    row_limit: float
    cache: int


@dataclass
class Row:
    """One runtime in one case, while it is being measured. The dictionaries are by threads.

    Attributes:
        works: a call for each routing.
        seconds: what was measured; no entry where that would take too long.
        long: whether a call is a long one.
    """

    runtime: Runtime
    ratio: float
    works: dict[int, list[Callable[[], Any]]]
    seconds: dict[int, list[float]] = field(default_factory=dict)
    long: dict[int, bool] = field(default_factory=dict)


class Measurement:
    """Runs a plan. `say` is told what is under way. Afterwards `rows`, `errors` and `left_out` are complete."""

    def __init__(self, plan: Plan, limits: Limits, say: Callable[[str], None]) -> None:
        self._plan, self._limits, self._say = plan, limits, say
        self._turn = 0  # counts calls, of all runtimes
        self.rows: list[dict[str, Any]] = []
        self.errors: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []

    def run(self) -> None:
        for threads in self._plan.threads:
            self._limits.measure(threads)
        for shape in self._plan.shapes:
            for name in self._plan.dtypes:
                self._shape(shape, getattr(torch, name))
        for row in self.rows:
            threads, seconds = row["threads"], row["seconds"]
            row["flops_fraction"] = row.pop("flops") / seconds / self._limits.peak_flops(row["dtype"], threads)
            row["bandwidth_fraction"] = row.pop("bytes") / seconds / self._limits.read_bandwidth(threads)

    def _shape(self, shape: Shape, dtype: torch.dtype) -> None:
        gc.collect()  # the weights of the shape before
        name = str(dtype).removeprefix("torch.")
        layers = random_layers(shape, dtype, layers_needed(shape, dtype, self._plan.cache))
        runtimes = torch_runtimes(shape, layers)
        stock: type[Moe] | type[QMoe] = Moe if dtype == torch.float32 else QMoe
        try:
            runtimes.append(stock(shape, layers, self._plan.threads))
        except Exception as error:  # another version may refuse these types; the others can still be compared
            self._leave_out(shape, stock.name, stock.dtype, None, first_line(error))
        self._check(shape, dtype, layers, runtimes)
        for tokens in self._plan.tokens:
            started = time.perf_counter()
            self._case(shape, dtype, tokens, len(layers), runtimes)
            self._say(f"{shape} {name}, {tokens} tokens: {time.perf_counter() - started:.1f} s")

    def _check(self, shape: Shape, dtype: torch.dtype, layers: list[Layer], runtimes: list[Runtime]) -> None:
        threads = max(self._plan.threads)
        torch.set_num_threads(threads)
        for ratio in self._plan.ratios:
            rest = runtimes
            for tokens in (ERROR_TOKENS, FEW_TOKENS):  # the second for those that do not take the first
                routed = random_routings(shape, dtype, tokens, self._plan.ratios, len(layers))[0]
                expected = reference(layers[routed.layer], routed, ratio)
                for runtime in rest:
                    if runtime.takes(tokens, ratio):
                        with torch.inference_mode():
                            out = torch.as_tensor(runtime.work(routed, ratio, threads)())
                        self._error(_key(shape, runtime.name, runtime.dtype), tokens, ratio, relative_error(out, expected))
                rest = [runtime for runtime in rest if not runtime.takes(tokens, ratio)]

    def _error(self, key: dict[str, Any], tokens: int, ratio: float, error: float) -> None:
        right = error <= TOLERANCE[key["dtype"]]
        self.errors.append(key | {"tokens": tokens, "skip_ratio": ratio, "error": error, "right": right})
        if not right:
            self._say(f"{key['runtime']} {key['dtype']} is wrong by {error:.1e}: its times mean nothing")

    def _case(self, shape: Shape, dtype: torch.dtype, tokens: int, layers: int, runtimes: list[Runtime]) -> None:
        plan = self._plan
        taken = [(runtime, ratio) for ratio in plan.ratios for runtime in runtimes if runtime.takes(tokens, ratio)]
        routings = random_routings(shape, dtype, tokens, plan.ratios, layers)
        rows = [
            Row(runtime, ratio, {n: [runtime.work(routed, ratio, n) for routed in routings] for n in plan.threads})
            for runtime, ratio in taken
        ]
        for threads in plan.threads:
            torch.set_num_threads(threads)
            for row in rows:
                seconds = min(self._call(row, threads, len(routings)) for _ in range(WARM_UPS))
                row.seconds[threads], row.long[threads] = [], seconds > LONG_CALL
                if seconds * plan.repetitions > plan.row_limit:
                    why = f"one call takes {seconds:.2g} s, more than {plan.row_limit:g} s for all"
                    case = {"tokens": tokens, "skip_ratio": row.ratio, "threads": threads}
                    self._leave_out(shape, row.runtime.name, row.runtime.dtype, case, why)
                    del row.seconds[threads]
        for sweep in range(SWEEPS):
            rounds = plan.repetitions * (sweep + 1) // SWEEPS - plan.repetitions * sweep // SWEEPS
            if not rounds:
                continue
            for threads in plan.threads:
                torch.set_num_threads(threads)
                self._limits.measure(threads)
                measured = [row for row in rows if threads in row.seconds]
                for row in measured:
                    if not row.long[threads]:
                        self._call(row, threads, len(routings))
                gc.collect()
                for _ in range(rounds):
                    for row in measured:
                        row.seconds[threads].append(self._call(row, threads, len(routings)))
                    if len(measured) % len(routings) == 0:
                        self._turn += 1
        for row in rows:
            for threads, timed in row.seconds.items():
                self.rows.append(_result(shape, tokens, row, threads, timed, routings))

    def _call(self, row: Row, threads: int, routings: int) -> float:
        """Seconds of one call on the next routing."""
        work = row.works[threads][self._turn % routings]
        self._turn += 1
        if threads > 1:
            time.sleep(PAUSE)
        gc.disable()
        with torch.inference_mode():
            started = time.perf_counter()
            work()
            seconds = time.perf_counter() - started
        gc.enable()
        return seconds

    def _leave_out(self, shape: Shape, runtime: str, dtype: str, case: dict[str, Any] | None, why: str) -> None:
        self.left_out.append(_key(shape, runtime, dtype) | (case or {}) | {"reason": why})
        self._say(f"left out: {runtime} {dtype} at {shape} {case or ''}: {why}")


def _key(shape: Shape, runtime: str, dtype: str) -> dict[str, Any]:
    return {
        "runtime": runtime,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "dtype": dtype,
    }


def _result(shape: Shape, tokens: int, row: Row, threads: int, seconds: list[float], routings: list[Routed]) -> dict[str, Any]:
    """A row of the JSON, with `flops` and `bytes` where the fractions will be. Work of a routing: its kept pairs."""
    kept = statistics.mean(routed.kept(row.ratio) for routed in routings)
    experts = statistics.mean(routed.distinct_experts(row.ratio) for routed in routings)
    quarters = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return _key(shape, row.runtime.name, row.runtime.dtype) | {
        "tokens": tokens,
        "skip_ratio": row.ratio,
        "skipped": 1 - kept / (tokens * shape.top_k),
        "threads": threads,
        "seconds": statistics.median(seconds),
        "quartiles": [quarters[0], quarters[2]],
        "repetitions": len(seconds),
        "flops": 2 * kept * shape.expert_parameters,
        "bytes": experts * shape.expert_parameters * row.runtime.weight_bytes,
    }
