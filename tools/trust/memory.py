"""How much memory this process has handed out, and whether that grows with what it does."""

import ctypes
import os
from pathlib import Path

import numpy as np

MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"}  # of a process that is measured


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, all size_t: over all arenas."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                                                     "uordblks", "fordblks", "keepcost")]  # fmt: skip


def in_use() -> int:
    """Bytes that malloc has handed out and not got back."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


Look = tuple[int, int, int]  # what is counted, so far; bytes in use; bytes resident


def slope(looks: list[Look]) -> tuple[float, float, float]:
    """Bytes in use for each 1,000 of what is counted, with the bounds of three standard errors: the median of the slopes
    between any two of the second half, when all is warm, and the slopes at Sen's ranks (1968). A single small step is no slope
    to it."""
    half = np.array(looks[len(looks) // 2 :], np.float64)
    first, second = np.triu_indices(len(half), 1)
    slopes = np.sort(1000 * (half[second, 1] - half[first, 1]) / (half[second, 0] - half[first, 0]))
    away = 1.5 * np.sqrt(len(half) * (len(half) - 1) * (2 * len(half) + 5) / 18)  # half of three errors of Kendall's S
    low, high = max(0, round(len(slopes) / 2 - away)), min(len(slopes) - 1, round(len(slopes) / 2 + away))
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def growth(looks: list[Look]) -> dict[str, float]:
    """What malloc has handed out more for each 1,000; `leak`: 0 unless the lower bound is above it."""
    rise, low, high = slope(looks)
    resident = looks[-1][2] / looks[len(looks) // 2][2] - 1
    return {"slope": rise, "low": low, "high": high, "leak": rise if low > 0 else 0.0, "resident_second_half": resident}


def leaked(found: dict[str, float]) -> str:
    """Of `growth`, for people."""
    return (
        f"{found['leak']:,.0f} bytes (measured {found['slope']:+,.0f}, between {found['low']:+,.0f} and {found['high']:+,.0f})"
    )
