"""Prefill and decode time, full and skipped, against other runtimes: `modes bench`."""

from modes_cli.benchmark.bench import bench

__all__ = ["bench"]
