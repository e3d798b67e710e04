"""What the processor can do at most, measured in the run that is held against it. Compiles limits.cpp for this machine."""

import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("limits.cpp")
EVERY = 3.0  # seconds
READ = 512 << 20  # bytes that are read for the bandwidth; far more than a cache holds


class Limits:
    """Best rates seen so far. Measure often: the more often, the less a slow moment of the machine lowers the limit.

    Attributes:
        flops: (dtype, threads) -> every peak measured, FLOP/s. dtype is `float32` or `bfloat16`.
        bandwidth: threads -> every read rate measured, bytes/s.
    """

    def __init__(self, read: int = READ) -> None:
        self.flops: dict[tuple[str, int], list[float]] = {}
        self.bandwidth: dict[int, list[float]] = {}
        self._due: dict[int, float] = {}  # threads -> when to measure again
        self._library = _compiled()
        # From torch, as the weights are: the size of a page makes a difference.
        self._buffer = torch.ones(read // 4)

    def measure(self, threads: int, tries: int = 4) -> None:
        """Some tenths of a second, at most every few seconds: more often the machine is no different."""
        if time.monotonic() < self._due.get(threads, 0.0):
            return
        for dtype in ("float32", "bfloat16"):
            peak = getattr(self._library, f"peak_{dtype}")(threads, tries)
            # Without an instruction for bfloat16 products, float32's are the fastest way to compute them.
            peak = peak or max(self.flops["float32", threads])
            self.flops.setdefault((dtype, threads), []).append(peak)
        buffer = self._buffer
        rate = self._library.read_bandwidth(threads, tries, buffer.data_ptr(), buffer.numel() * buffer.element_size())
        self.bandwidth.setdefault(threads, []).append(rate)
        self._due[threads] = time.monotonic() + EVERY

    def peak_flops(self, dtype: str, threads: int) -> float:
        # Eight-bit weights are expanded to float32 before they are multiplied.
        return max(self.flops["bfloat16" if dtype == "bfloat16" else "float32", threads])

    def read_bandwidth(self, threads: int) -> float:
        return max(self.bandwidth[threads])

    def rows(self) -> list[dict[str, Any]]:
        """For the JSON: best and median of every limit."""
        measured = [("flops", dtype, threads, rates) for (dtype, threads), rates in self.flops.items()]
        measured += [("read_bandwidth", "", threads, rates) for threads, rates in self.bandwidth.items()]
        return [
            {"limit": limit, "dtype": dtype or None, "threads": threads, "best": max(rates), "median": statistics.median(rates)}
            for limit, dtype, threads, rates in measured
        ]


def _compiled() -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "limits.so"
        options = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*compiler.split(), *options, "-o", str(target), str(SOURCE)], check=True, stdout=subprocess.DEVNULL)
        library = ctypes.CDLL(str(target))  # stays mapped when the file is gone
    library.peak_float32.argtypes = library.peak_bfloat16.argtypes = [ctypes.c_int, ctypes.c_int]
    library.read_bandwidth.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    for function in (library.peak_float32, library.peak_bfloat16, library.read_bandwidth):
        function.restype = ctypes.c_double
    return library
