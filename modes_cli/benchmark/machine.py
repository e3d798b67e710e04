"""What this machine can do at most, measured in the same run as the cases that are held against it."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modes_cli.artifacts.bench import Machine

SIDE = 1024  # of the square matrices whose product gives the peak
READ = 256 << 20  # bytes that are read for the bandwidth; far more than a cache holds


def measure_machine(device: torch.device) -> Machine:
    """Best matmul rate (float32) and best read rate, over a few tries, with torch's current threads."""
    a, b = torch.rand(SIDE, SIDE, device=device), torch.rand(SIDE, SIDE, device=device)
    block = torch.ones(READ // 4, device=device)
    product = _fastest(lambda: a @ b, device)
    read = _fastest(lambda: block.sum(), device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Machine(
        cpu=_cpu_name(),
        threads=torch.get_num_threads(),
        device=name,
        peak_flops=2 * SIDE**3 / product,
        read_bandwidth=READ / read,
    )


def _fastest(work: Callable[[], torch.Tensor], device: torch.device, tries: int = 12) -> float:
    return min(timed(work, device) for _ in range(tries))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def median(values: list[float]) -> float:
    return statistics.median(values)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
