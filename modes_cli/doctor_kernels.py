"""Which kernels will run on this machine, and why: the operator libraries, and what each CUDA device gets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from modes_cli.runtime.cuda import Cuda

MANY, FEW = 8192, 1  # tokens: a prefill, and a step of decoding


def diagnose_kernels() -> list[dict[str, Any]]:
    """One entry for the CPU, one for CUDA, one for each CUDA device. What cannot be found out says why."""
    try:
        import torch

        from modes_cli.runtime.cuda import Cuda

        visible = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if _usable() else []
        return [_cpu(), *cuda_kernels(Cuda(), visible)]
    except Exception as error:  # a diagnosis names whatever is wrong, of whatever kind, and goes on
        return [_entry("cpu", None, str(error) or type(error).__name__, available=False)]


def _usable() -> bool:
    import torch

    return torch.cuda.is_available()


def _cpu() -> dict[str, Any]:
    """Which operator library ONNX Runtime and PyTorch get on the CPU, or why there is none."""
    from modes_cli.runtime import libraries

    path = libraries.library_path()
    try:
        return _entry("cpu", path, f"version {libraries.version()}, {libraries.isa()}, from {path}", available=True)
    except Exception as error:  # as above
        return _entry("cpu", path, _said(error), available=False)


def cuda_kernels(cuda: Cuda, visible: list[torch.device]) -> list[dict[str, Any]]:
    """The CUDA library, and what it does on each of the devices that torch can use."""
    from modes_cli.runtime import libraries

    path = libraries.library_path(libraries.CUDA)
    try:
        version, count = cuda.library().modes_version().decode(), cuda.count()
    except Exception as error:  # as above
        return [_entry("cuda", path, _said(error), available=False)]
    seen = f"version {version}, from {path}; it sees {count or 'no'} CUDA device{'' if count == 1 else 's'}"
    if count and not visible:
        seen += ", torch none: it is for ONNX Runtime only"
    return [_entry("cuda", path, seen, available=count > 0), *(_device(cuda, device, path) for device in visible)]


def _device(cuda: Cuda, device: torch.device, path: Path | None) -> dict[str, Any]:
    try:
        paths = {tokens: cuda.path(device, tokens) for tokens in (MANY, FEW)}
        capability = f"compute capability {cuda.capability(device)}"
    except Exception as error:  # as above
        return _entry(str(device), path, _said(error), available=False)
    chosen = f"bfloat16 runs on `{paths[MANY]}` for {MANY} tokens, on `{paths[FEW]}` for {FEW}"
    return _entry(str(device), path, f"{capability}: {chosen}", available=True)


def _said(error: Exception) -> str:
    hint = getattr(error, "hint", None)
    return (str(error) or type(error).__name__) + (f"; {hint}" if hint else "")


def _entry(name: str, library: Path | None, reason: str, *, available: bool) -> dict[str, Any]:
    return {"name": name, "available": available, "library": None if library is None else str(library), "reason": reason}
