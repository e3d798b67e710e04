"""What a command that was stopped had already measured, so that the same command continues instead of starting again.

Each command has one file of it in the run folder, `NAME.unfinished.safetensors`, which it saves every minute and removes when
it is done. Sums go on from where they were in the same order, so the finished artifact has the same bytes either way. The file
belongs to exactly one fingerprint (`modes_cli.fingerprint`); one of another, or a damaged one, is not used.
"""

import hashlib
import json
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modes_cli import files
from modes_cli.artifacts.base import first_difference
from modes_cli.progress import Progress, Silent

INTERVAL = 60.0  # seconds between saves; a shorter run is not worth one
SHARE = 0.05  # of the time at most goes into saving: large states are saved less often
NOTES = "notes"  # the tensor that holds the JSON

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """What is saved. `done`: how many of the command's steps; `notes`: whatever else, as JSON."""

    done: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Any = None


class Unfinished:
    """The progress file of one command.

    Args:
        path: `file_of` the run folder.
        fingerprint: everything that must be equal for the state to be continued, flat.
        progress: is told what becomes of a state that is there.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], progress: Progress | None = None) -> None:
        self._path, self._fingerprint = path, json.loads(json.dumps(fingerprint))
        self._progress = progress or Silent()
        self._clock = Interval()

    def restore(self) -> State | None:
        """What was saved, or None if there is nothing to continue."""
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                found = json.loads(metadata["fingerprint"])
                if difference := first_difference(found, self._fingerprint):
                    name, before, now = difference
                    self._say(f"is of another run, {name} was `{before}` and is `{now}`")
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["sha256"] != _digest(tensors, metadata["done"]):
                raise ValueError("SHA-256")
            notes = json.loads(bytes(tensors.pop(NOTES).numpy()))
            return State(int(metadata["done"]), tensors, notes)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
            self._say("is damaged")
            return None

    def _say(self, problem: str) -> None:
        self._progress.note(f"note: `{self._path}` {problem}; it is not used")

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return self._clock.due

    def save(self, state: State) -> None:
        """Save, if it is time."""
        if not self.due:
            return
        with self._clock.spending():
            notes = torch.frombuffer(bytearray(json.dumps(state.notes).encode()), dtype=torch.uint8)
            together = sorted({**state.tensors, NOTES: notes}.items(), key=lambda one: -one[1].element_size())  # aligned
            tensors = {name: tensor.cpu().contiguous() for name, tensor in together}
            done = str(state.done)
            metadata = {
                "done": done,
                "fingerprint": json.dumps(self._fingerprint, sort_keys=True),
                "sha256": _digest(tensors, done),
            }
            with files.replacing(self._path) as file:  # piece by piece: references alone can be gigabytes
                file.write(_header(tensors, metadata))
                for tensor in tensors.values():
                    file.write(_bytes(tensor))

    def remove(self) -> None:
        files.remove(self._path)


class Interval:
    """When to save again: not before `INTERVAL` has passed, and so late that saving costs a small share of the time."""

    def __init__(self) -> None:
        self._saved, self._spent = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        wait = max(INTERVAL, self._spent / SHARE) if INTERVAL else 0.0
        return time.monotonic() - self._saved >= wait

    def spending(self) -> "_Spending":
        """A block that saves."""
        return _Spending(self)

    def saved(self, seconds: float) -> None:
        self._saved, self._spent = time.monotonic(), seconds


class _Spending:
    def __init__(self, interval: Interval) -> None:
        self._interval = interval

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._interval.saved(time.monotonic() - self._began)


def file_name(artifact: str) -> str:
    """Of the progress file of what makes `artifact`, as calibration.unfinished.safetensors."""
    return f"{Path(artifact).stem}.unfinished.safetensors"


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, not copied."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Of a safetensors file."""
    tree: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        tree[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _digest(tensors: Mapping[str, Tensor], done: str) -> str:
    """SHA-256 over names and values: one altered bit would otherwise end in a result that is quietly wrong."""
    digest = hashlib.sha256(done.encode())
    for name in sorted(tensors):
        digest.update(f"\0{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\0".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()
