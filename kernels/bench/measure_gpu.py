"""The measuring on a GPU: all runtimes of a case take turns, and what happens is told line by line.

A new kernel can hang, or leave the device unusable for the whole process. So this is made to be run by another process
(bench_gpu.py), which reads the lines, stops one that hangs, and goes on without the runtime that broke.

A call is one of several in a graph, each with other inputs: for few tokens they have so many experts between them that no
call finds its weights in the cache. What cannot be captured is launched call by call, after a write that fills the cache.
"""

import gc
import statistics
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
from kernels.bench.names import GROUPED_MM, OURS, TRITON
from kernels.bench.ours import FEW_TOKENS, Ours, Runtime
from modes_cli.errors import KernelError, first_line
from modes_cli.timing import Measurable, NotCaptured, copy_rate, on_clock, on_graph, on_stream, product_rate, read_rate

PATHS = ("hopper", "mma", "decode")
DECODE_TOKENS = 64  # up to here inputs take turns; with more tokens every call reads more than a cache holds
CHECKED_TOKENS = 256  # of a call are compared with the reference
UNFIT = "does not compute this layer"  # what the library says of a path that is made for other sizes or devices
SIDE, SIZE = 8192, 4 << 30

Json = dict[str, Any]
Tell = Callable[[str, Json], None]


@dataclass(frozen=True)
class GpuPlan:
    """What is measured. `without`: runtimes that are left out. `side`, `size`: of what the limits are measured with."""

    shape: Shape
    dtype: str
    tokens: list[int]
    ratios: list[float]
    repetitions: int
    device: str = "cuda"
    without: frozenset[str] = frozenset()
    side: int = SIDE
    size: int = SIZE


@dataclass(frozen=True)
class Candidate:
    """A runtime. `captures`: a CUDA graph can hold it. `most_tokens`: above it is not worth its time."""

    runtime: Runtime
    captures: bool = True
    most_tokens: int = 1 << 62


@dataclass
class Row:
    """One runtime in one case, while it is being measured."""

    name: str
    runtime: Runtime
    ratio: float
    measurable: Measurable
    path: str | None
    error: float
    seconds: list[float] = field(default_factory=list)


class GpuMeasurement:
    """Runs a plan and tells `machine`, `limits`, `start`, `row`, `error`, `left_out` and `done`, as they happen."""

    def __init__(self, plan: GpuPlan, tell: Tell) -> None:
        self._plan, self._tell = plan, tell
        self._device = torch.device(plan.device)
        self._dtype: torch.dtype = getattr(torch, plan.dtype)
        self._cuda = self._device.type == "cuda"
        self._cache = _l2_cache(self._device) if self._cuda else 1 << 20
        self._flushed = torch.empty(4 * self._cache, dtype=torch.uint8, device=self._device)
        self._pool: Any = torch.cuda.graph_pool_handle() if self._cuda else None

    def run(self) -> None:
        self._tell("machine", _machine(self._device))
        limits = measured_limits(self._plan, self._device, self._dtype)
        self._tell("limits", limits)
        shape = self._plan.shape
        # Three layers, so that calls in turn read several times what the cache holds however few experts they keep.
        count = max(3, layers_needed(shape, self._dtype, self._cache)) if min(self._plan.tokens) <= DECODE_TOKENS else 1
        layers = random_layers(shape, self._dtype, count, self._plan.device)
        candidates = [one for one in self._candidates(layers) if one.runtime.name not in self._plan.without]
        for tokens in self._plan.tokens:
            self._case(tokens, layers, candidates, limits)
            self._tell("done", {"tokens": tokens})

    def _candidates(self, layers: list[Layer]) -> list[Candidate]:
        """Those whose libraries are there. Their modules are imported here: one that fails is only one less."""
        found: list[Candidate] = []

        def add(name: str, make: Callable[[], Candidate]) -> None:
            if name in self._plan.without:
                return
            self._tell("start", {"runtime": name})
            try:
                found.append(make())
            except Exception as error:  # whatever a library raises
                self._tell("error", {"runtime": name, "reason": f"{type(error).__name__}: {first_line(error)}"})

        add(OURS, lambda: Candidate(Ours(layers)))
        for path in PATHS if self._cuda else ():
            add(f"{OURS}-{path}", lambda path=path: Candidate(Ours(layers, path)))  # type: ignore[misc]
        for implementation, dropped, most in (
            ("grouped_mm", False, 1 << 62),
            ("grouped_mm", True, 1 << 62),
            ("eager", False, FEW_TOKENS),
        ):
            name = f"transformers {implementation}" + (", dropped" if dropped else "")
            captures = implementation == "grouped_mm" and not dropped  # the others ask the device how many there are
            make = _transformers(self._plan.shape, layers, implementation, dropped)
            add(name, lambda make=make, captures=captures, most=most: Candidate(make(), captures, most))  # type: ignore[misc]
        add(GROUPED_MM, lambda: Candidate(_grouped_mm(layers)))
        if self._cuda:
            add(TRITON, lambda: Candidate(_triton(layers)))
        return found

    # -- one case ---------------------------------------------------------------------------------------------------

    def _case(self, tokens: int, layers: list[Layer], candidates: list[Candidate], limits: Json) -> None:
        gc.collect()
        ratios, few = self._plan.ratios, tokens <= DECODE_TOKENS
        made = random_routings(self._plan.shape, self._dtype, tokens, ratios, len(layers) if few else 1, 17 if few else 1)
        routings = [routed.to(self._plan.device) for routed in made]
        rows = []
        for ratio in ratios:
            some = torch.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS)).long().to(self._device)
            first = routings[0].of_tokens(some)
            expected = reference(layers[first.layer], first, ratio)
            for candidate in candidates:
                if tokens > candidate.most_tokens or not candidate.runtime.takes(tokens, ratio):
                    continue
                key = {"runtime": candidate.runtime.name, "tokens": tokens, "skip_ratio": ratio}
                self._tell("start", key)
                try:
                    rows.append(self._row(candidate, routings, ratio, some, expected))
                except KernelError as error:
                    fits = UNFIT not in str(error)
                    self._tell("error" if fits else "left_out", key | {"reason": first_line(error)})
                    self._require_device()
                except Exception as error:
                    self._tell("error", key | {"reason": f"{type(error).__name__}: {first_line(error)}"})
                    self._require_device()
        with torch.inference_mode():
            for _ in range(self._plan.repetitions):
                for row in rows:
                    self._tell("start", {"runtime": row.name, "tokens": tokens, "skip_ratio": row.ratio})
                    row.seconds.append(row.measurable.seconds())
        for row in rows:
            self._tell("row", _result(self._plan, tokens, row, routings, limits))

    def _row(
        self, candidate: Candidate, routings: list[Routed], ratio: float, some: torch.Tensor, expected: torch.Tensor
    ) -> Row:
        runtime = candidate.runtime
        works = [runtime.work(routed, ratio, 1) for routed in routings]
        with torch.inference_mode():
            error = relative_error(works[0]()[some], expected)
            path = runtime.path(routings[0]) if self._cuda and runtime.name == OURS and isinstance(runtime, Ours) else None
            measurable = self._measurable(candidate, works, ratio, len(routings[0].x))
            measurable.seconds()  # warms up
        return Row(runtime.name, runtime, ratio, measurable, path, error)

    def _measurable(self, candidate: Candidate, works: list[Callable[[], object]], ratio: float, tokens: int) -> Measurable:
        if not self._cuda:
            return on_clock(works, self._device)
        if candidate.captures:
            try:
                return on_graph(works, self._pool)
            except NotCaptured as error:
                key = {"runtime": candidate.runtime.name, "tokens": tokens, "skip_ratio": ratio}
                self._tell("error", key | {"reason": f"not captured in a graph: {error}"})
                self._require_device()
        return on_stream(works, self._flushed.zero_)

    def _require_device(self) -> None:
        """Raise if the device is not usable any more: then nothing that this process measures means anything."""
        if self._cuda:
            torch.cuda.synchronize(self._device)


def _machine(device: torch.device) -> Json:
    if device.type != "cuda":
        return {"gpu": str(device)}
    found = torch.cuda.get_device_properties(device)
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "processors": found.multi_processor_count,
        "memory": found.total_memory,
        "l2_cache": _l2_cache(device),
        "cuda": torch.version.cuda,
    }


def _l2_cache(device: torch.device) -> int:
    """Bytes; those of a large one where torch does not say."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 128 << 20


def measured_limits(plan: GpuPlan, device: torch.device, dtype: torch.dtype) -> Json:
    """FLOP/s of square products and of the layer's own two, bytes/s of copies and reads."""
    H, I, rows = plan.shape.hidden, plan.shape.intermediate, plan.side  # noqa: E741
    return {
        "product": product_rate(plan.side, plan.side, plan.side, device, dtype),
        "product_gate_up": product_rate(rows, 2 * I, H, device, dtype),
        "product_down": product_rate(rows, H, I, device, dtype),
        "copy": copy_rate(plan.size // 2, device),
        "read": read_rate(plan.size, device),
    }


def _transformers(shape: Shape, layers: list[Layer], implementation: str, dropped: bool) -> Callable[[], Runtime]:
    def make() -> Runtime:
        from kernels.bench.peers import Transformers

        return Transformers(shape, layers, implementation, dropped=dropped)

    return make


def _grouped_mm(layers: list[Layer]) -> Runtime:
    from kernels.bench.peers_torch import OnLayer, grouped_moe

    return OnLayer(GROUPED_MM, layers, grouped_moe)


def _triton(layers: list[Layer]) -> Runtime:
    from kernels.bench.peers_torch import OnLayer
    from kernels.bench.peers_triton import fused_moe

    return OnLayer(TRITON, layers, fused_moe)


def _result(plan: GpuPlan, tokens: int, row: Row, routings: list[Routed], limits: Json) -> Json:
    """A row of the JSON. Its bytes: each surviving expert's weights once, inputs and outputs; experts from the routing."""
    shape, kept = plan.shape, statistics.mean(routed.kept(row.ratio) for routed in routings)
    experts = statistics.mean(routed.distinct_experts(row.ratio) for routed in routings)
    seconds, quarters = statistics.median(row.seconds), statistics.quantiles(row.seconds, n=4, method="inclusive")
    moved = (experts * shape.expert_parameters + 2 * tokens * shape.hidden) * row.runtime.weight_bytes
    return {
        "runtime": row.name,
        "path": row.path,
        "dtype": row.runtime.dtype,
        "tokens": tokens,
        "skip_ratio": row.ratio,
        "skipped": 1 - kept / (tokens * shape.top_k),
        "experts": experts,
        "seconds": seconds,
        "quartiles": [quarters[0], quarters[2]],
        "repetitions": len(row.seconds),
        "timed": row.measurable.how,
        "flops_fraction": 2 * kept * shape.expert_parameters / seconds / limits["product"],
        "bandwidth_fraction": moved / seconds / limits["copy"],
        "error": row.error,
        "right": row.error <= TOLERANCE[row.runtime.dtype],
    }
