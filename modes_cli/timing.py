"""Timing on a device, and the rates that times are held against: products, copies and reads, measured and not looked up."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modes_cli.errors import first_line

Work = Callable[[], object]

WARM_UPS = 3  # before a capture: libraries set themselves up in their first calls, which a graph cannot record


class Measurable(NamedTuple):
    """Something to be measured again and again.

    Attributes:
        seconds: runs every work once, and returns the seconds of one on average.
        how: `graph`: replayed CUDA graph; `stream`: launched one by one; `clock`: on a CPU.
    """

    seconds: Callable[[], float]
    how: str


class NotCaptured(Exception):
    """A CUDA graph could not be made of something. The message says why."""


def timed(work: Work, device: torch.device) -> float:
    """Seconds of one call by the clock, the device's queue included."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(values: list[float]) -> float:
    return statistics.median(values)


def captured(works: Sequence[Work], pool: Any = None) -> Callable[[], None]:
    """A CUDA graph of the works, one after the other; calling the result replays it. `pool`: memory shared with others.

    Raises:
        NotCaptured: something in it waits for the device, or is not allowed in a graph.
    """
    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            works[0]()
        for work in works[1:]:
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            for work in works:
                work()
    except Exception as error:  # torch's own, or that of whoever saw that it is being captured
        raise NotCaptured(first_line(error)) from error
    return graph.replay


@functools.cache
def _side_stream() -> Any:
    """Always the same: torch keeps what was allocated on a stream for that stream."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def event_seconds(work: Work) -> float:
    """Seconds that the device spends between the first and the last launch of a call."""
    event: Any = torch.cuda.Event  # untyped
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def on_graph(works: Sequence[Work], pool: Any = None) -> Measurable:
    """All works in one CUDA graph. Raises NotCaptured."""
    replay = captured(works, pool)
    return Measurable(lambda: event_seconds(replay) / len(works), "graph")


def on_stream(works: Sequence[Work], before: Work = lambda: None) -> Measurable:
    """Each work on its own, after `before`, which is not timed."""

    def seconds() -> float:
        total = 0.0
        for work in works:
            before()
            total += event_seconds(work)
        return total / len(works)

    return Measurable(seconds, "stream")


def on_clock(works: Sequence[Work], device: torch.device) -> Measurable:
    """Each work on its own, by the clock: where there are no events, or where launching is part of the cost."""
    return Measurable(lambda: sum(timed(work, device) for work in works) / len(works), "clock")


# -- rates --------------------------------------------------------------------------------------------------------------


def fastest(work: Work, device: torch.device, tries: int = 12) -> float:
    """Seconds of the fastest of some calls."""
    work()
    if device.type == "cuda":
        return min(event_seconds(work) for _ in range(tries))
    return min(timed(work, device) for _ in range(tries))


def product_rate(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of [m, k] x [k, n], the second matrix stored as a linear layer's weights are. Random: zeros run faster."""
    g = torch.Generator(device).manual_seed(0)
    a, b = (torch.empty(rows, k, device=device, dtype=dtype).normal_(generator=g) for rows in (m, n))
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2.0 * m * n * k / fastest(lambda: torch.mm(a, b.t(), out=out), device)


def read_rate(size: int, device: torch.device) -> float:
    """Bytes/s of summing `size` bytes."""
    block = torch.ones(size // 4, device=device)
    return size / fastest(block.sum, device)


def copy_rate(size: int, device: torch.device) -> float:
    """Bytes/s of a copy within the device's memory, what is read and what is written counted."""
    source = torch.ones(size // 4, device=device)
    target: Tensor = torch.empty_like(source)
    return 2.0 * size / fastest(lambda: target.copy_(source), device)
