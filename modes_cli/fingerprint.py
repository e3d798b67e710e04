"""What work that was stopped depends on. It is continued only where all of it is the same: a missing field is a difference.

An artifact's identity says what it was made from. Half a measurement needs more: the other half must be measured with the same
files, code and machine, or the whole has the bytes of neither.
"""

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from modes_cli import files
from modes_cli.safetensors_header import parse_header

BLOCK = 4096  # bytes that are read of each tensor
SMALL = 256 << 20  # bytes of a file that is read as a whole; the largest is a tokenizer's, tens of megabytes
# Those that decide what a sample, a token, a weight or a sum is.
PACKAGES = (
    "accelerate", "av", "datasets", "lmms_eval", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxscript",
    "pillow", "safetensors", "tokenizers", "torch", "transformers",
)  # fmt: skip


def fingerprint(identity: Mapping[str, Any], model: Path, device: torch.device | str | None = None) -> dict[str, Any]:
    """Flat: an artifact's identity, the model's files, and everything that computes.

    Args:
        identity: of what the finished work would be, as `artifacts.base.flatten` gives it.
        model: the folder of the checkpoint or bundle.
        device: where the model computes; None where it does not matter.
    """
    return {**identity, "model.files": model_files(model), **_tools(), **_machine(device)}


def model_files(folder: Path) -> str:
    """SHA-256 over every small file of a model's folder, and over the header of each weight file and the middle of each of its
    tensors: a model that was trained further differs in all of them, and 60 GB need not be read to tell.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        if path.suffix == ".safetensors":
            for piece in _samples(path):
                digest.update(piece)
        elif path.stat().st_size <= SMALL:
            digest.update(files.sha256(path).encode())
    return digest.hexdigest()


def _samples(path: Path) -> Iterable[bytes]:
    header = parse_header(path, path.stat().st_size)
    with path.open("rb") as file:
        yield file.read(header.data_start)
        for entry in sorted(header.tensors.values(), key=lambda entry: entry.start):
            file.seek(entry.start + max(0, entry.length - BLOCK) // 2)
            yield file.read(min(BLOCK, entry.length))


@cache
def code_digest() -> str:
    """SHA-256 over this package's Python files."""
    code = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        code.update(f"\0{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return code.hexdigest()


@cache
def _tools() -> dict[str, Any]:
    """This package's code and kernels, and the libraries it computes with."""
    from modes_cli.runtime import libraries

    found: dict[str, Any] = {"tools.code": code_digest(), "tools.python": platform.python_version()}
    for name in (libraries.CPU, libraries.CUDA):
        library = libraries.library_path(name)
        found[f"tools.{name}"] = None if library is None else files.sha256(library)
    return found | {f"tools.{name}": _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine(device: torch.device | str | None) -> dict[str, Any]:
    """What decides the last bits of a sum."""
    if device is None:
        return {}
    place = torch.device(device)
    if place.type == "cuda" and torch.cuda.is_available():
        return {"machine.device": torch.cuda.get_device_name(place)}
    return {
        "machine.device": str(place),
        "machine.cpu": torch.backends.cpu.get_cpu_capability(),
        "machine.threads": torch.get_num_threads(),
        "machine.isa": os.environ.get("MODES_ISA"),
    }
