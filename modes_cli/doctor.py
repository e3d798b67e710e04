"""What this machine has: versions, devices, and which kernels will run here and why."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from modes_cli.doctor_kernels import diagnose_kernels

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "onnxruntime-gpu",
    "onnxruntime",
    "onnx",
    "numpy",
    "datasets",
    "accelerate",
    "pydantic",
    "typer",
)


def diagnose() -> dict[str, Any]:
    """`versions` by package, `devices` and `kernels` as lists. What cannot be found out says why instead of failing."""
    return {"versions": _versions(), "devices": _devices(), "kernels": diagnose_kernels()}


def _versions() -> dict[str, str | None]:
    import modes_cli

    return {
        "modes": modes_cli.__version__,
        "python": platform.python_version(),
        **{name: _installed(name) for name in PACKAGES},
    }


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = {"device": "cpu", "detail": f"{_cpu_name()}, {threads} threads", "memory": _memory()}
    return [cpu, *_cuda()]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _cuda() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError as error:
        return [{"device": "cuda", "detail": f"unknown: torch cannot be imported ({error})", "memory": None}]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return [
            {
                "device": "cuda",
                "detail": "none: "
                + (f"torch is built for CUDA {built} but sees no device" if built else "torch is built without CUDA"),
                "memory": None,
            }
        ]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        found.append({"device": f"cuda:{index}", "detail": detail, "memory": properties.total_memory})
    return found
