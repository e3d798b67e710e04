"""Headers of safetensors files. What ours takes, the safetensors library reads in the same way."""

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from modes_cli.safetensors_header import read_header
from tests.fuzz.mutate import as_safetensors as mutate
from tests.fuzz.places import real, scratch

__all__ = ["mutate", "one", "seeds"]


def seeds() -> list[bytes]:
    tensors = {"a.weight": np.ones((2, 3), np.float32), "b": np.zeros((4,), np.int64), "empty": np.zeros((0, 7), np.float16)}
    whole = real("bundle", "thresholds.safetensors").read_bytes()
    return [save(tensors), save(tensors, {"format": "pt"}), whole]


def one(data: bytes) -> None:
    path = scratch("header") / "a.safetensors"
    path.write_bytes(data)
    header = read_header(path)
    try:
        with safe_open(path, framework="numpy") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise AssertionError(f"the library refuses what was taken: {error}") from error
    assert shapes == {name: entry.shape for name, entry in header.tensors.items()}
    assert metadata == header.metadata
