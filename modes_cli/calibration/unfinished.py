"""What a calibration that was stopped had already measured, so that the same command continues instead of starting again.

Sums go on from where they were in the same order, so the finished artifact has the same bytes either way. The file belongs
to exactly one identity (model, samples, options, versions); one of another identity, or a damaged one, is not used.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from modes_cli import files

FILE = "calibration.unfinished.safetensors"
INTERVAL = 60.0  # seconds between saves; a shorter run is not worth one


class Unfinished:
    """The progress file of one calibration."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path, self._identity = path, json.dumps(identity, sort_keys=True)
        self._saved = time.monotonic()

    def restore(self) -> tuple[dict[str, Tensor], int] | None:
        """Tensors and number of batches that were done, or None if there is nothing to continue."""
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != self._identity:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return (tensors, int(metadata["batches"])) if metadata["sha256"] == _digest(tensors) else None
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def save(self, tensors: dict[str, Tensor], batches: int) -> None:
        """Save, unless the last save was a moment ago."""
        if time.monotonic() - self._saved < INTERVAL:
            return
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"identity": self._identity, "batches": str(batches), "sha256": _digest(contiguous)}
        files.write_bytes(self._path, save(contiguous, metadata=metadata))
        self._saved = time.monotonic()

    def remove(self) -> None:
        files.remove(self._path)


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names and values: one altered bit would otherwise end in a calibration that is quietly wrong."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\0".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
