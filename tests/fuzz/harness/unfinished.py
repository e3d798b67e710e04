"""NAME.unfinished.safetensors of the right fingerprint. A damaged one is not used; it is no error."""

import torch

from modes_cli import unfinished
from tests.fuzz.mutate import as_safetensors as mutate
from tests.fuzz.places import scratch

__all__ = ["mutate", "one", "seeds"]

FINGERPRINT = {"model": "m", "data": "d"}


def seeds() -> list[bytes]:
    path, found = scratch("unfinished") / "seed.safetensors", []
    interval, unfinished.INTERVAL = unfinished.INTERVAL, 0.0
    for notes in (None, {"answers": ["a", "b"]}):
        tensors = {"sums": torch.ones(3, 4), "half": torch.ones(2, dtype=torch.bfloat16), "count": torch.arange(3)}
        unfinished.Unfinished(path, FINGERPRINT).save(unfinished.State(3, tensors, notes))
        found.append(path.read_bytes())
    unfinished.INTERVAL = interval
    float8 = found[0].replace(b'"BF16", "shape": [2]', b'"F8_E4M3", "shape": [4]')
    return [*found, float8]


def one(data: bytes) -> None:
    path = scratch("unfinished") / "a.unfinished.safetensors"
    path.write_bytes(data)
    state = unfinished.Unfinished(path, FINGERPRINT).restore()
    assert state is None or state.done >= 0, "a number of steps that is none"
