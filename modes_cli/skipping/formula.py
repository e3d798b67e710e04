"""Contributions as formulas: a few tensors per layer, and torch operations on one layer's pairs.

What a formula computes does not depend on the order of a token's slots. Its operations can be traced and exported: no
control flow depends on data, nothing is read back from a device.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from modes_cli.runtime.devices import refuse_while_capturing
from modes_cli.skipping.contribution import Contribution, Pairs

ONE = 2**24  # fixed point: sums of such integers do not depend on their order
_PRIME = 2**31 - 1


class Sizes(NamedTuple):
    """Those of a model that a formula's tensors depend on."""

    experts: int
    top_k: int
    hidden: int


class Formula(Contribution):
    """A contribution that is computed from one layer's tensors and pairs.

    Attributes:
        tensors: (layers, ...) float32 each, by name; a bundle carries them, and `type(formula)(tensors, parameters)` is the
            same formula again.
        parameters: numbers that are the same in every layer.
    """

    def __init__(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, float]) -> None:
        self.tensors = {name: tensor.detach().float().contiguous() for name, tensor in sorted(tensors.items())}
        self.parameters = dict(parameters)
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            digest.update(f"{name} {tuple(tensor.shape)}\0".encode())
            digest.update(tensor.cpu().numpy().tobytes())
        self.key = f"{type(self).__name__} {json.dumps(self.parameters, sort_keys=True)} {digest.hexdigest()}"
        self._placed: dict[torch.device, dict[str, tuple[Tensor, ...]]] = {}

    def __call__(self, pairs: Pairs) -> Tensor:
        device = pairs.pi.device
        if device not in self._placed:  # once: later calls neither copy nor wait
            refuse_while_capturing(device, "a policy's tensors are used for the first time")
            with torch.inference_mode(False):
                self._placed[device] = {name: tensor.to(device).unbind(0) for name, tensor in self.tensors.items()}
        own = {name: layers[pairs.layer] for name, layers in self._placed[device].items()}
        return self.of(own, pairs)

    @classmethod
    def shapes(cls, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """One layer's part of each of `tensors`. What is read from a file is held against it."""
        return {}

    @abstractmethod
    def of(self, own: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        """(tokens, k) float32, 2^-24 to 1. `own`: this layer's part of `tensors`."""


def chosen(pairs: Pairs) -> Tensor:
    """(tokens, k) int64: the pairs' experts."""
    assert pairs.experts is not None, "this rule looks at experts"
    return pairs.experts.long()


def before(pairs: Pairs) -> Tensor:
    """(tokens, k, k) bool: whether slot i ranks before slot j, at [token, j, i]. Among equal pi, the lower expert does."""
    pi, experts = pairs.pi, chosen(pairs)
    higher = pi[:, None, :] > pi[:, :, None]
    equal = pi[:, None, :] == pi[:, :, None]
    return higher | (equal & (experts[:, None, :] < experts[:, :, None]))


def rank(pairs: Pairs) -> Tensor:
    """(tokens, k) int64: 0 for a token's largest pi."""
    return before(pairs).to(torch.int64).sum(-1)


def fixed(pi: Tensor) -> Tensor:
    """pi in units of 2^-24, int64."""
    return (pi * float(ONE)).to(torch.int64)


def token_hash(pairs: Pairs, salt: int = 0) -> Tensor:
    """(tokens, 1) int64: a hash of the set of a token's (expert, pi)."""
    slots = mix(mix(fixed(pairs.pi)) + chosen(pairs) + 1)
    return mix(slots.sum(1, keepdim=True) + salt)


def mix(x: Tensor) -> Tensor:
    """A hash of non-negative int64 values, below 2^31: three quadratic steps modulo a prime, so that nothing overflows."""
    for factor, offset in ((805459861, 374761393), (634520977, 668265263), (1013904223, 144665269)):
        x = x % _PRIME
        x = (x * x + x * factor + offset) % _PRIME
    return x


def uniform(hashed: Tensor) -> Tensor:
    """float32 in [0, 1), multiples of 2^-24, from hashes."""
    return (hashed % ONE).to(torch.float32) * (1.0 / ONE)
