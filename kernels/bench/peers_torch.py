"""The layer by hand on torch's grouped matrix product: kept pairs sorted by expert, rows gathered, results put back.

What one can write in PyTorch today without kernels of one's own. Nothing is read by the host, so a CUDA graph can hold it;
the price is that rows of skipped pairs are gathered too. They lie at the end, where the product computes nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.bench.cases import Layer, Routed
from modes_cli.skipping.policy import routing_probability

Function = Callable[[Layer, Tensor, Tensor, Tensor, Tensor], Tensor]  # of x, ids, weights and tau


class Sorted(NamedTuple):
    """Kept pairs by expert. P = T * k, E experts.

    Attributes:
        order: [P] pair of each row; the skipped ones last.
        expert: [P] of each row, E where it is skipped.
        ends: [E] int32, behind the last row of each expert.
    """

    order: Tensor
    expert: Tensor
    ends: Tensor


def sort_pairs(ids: Tensor, weights: Tensor, tau: Tensor, experts: int) -> Sorted:
    """Of ids and weights [T, k]."""
    kept = routing_probability(weights) >= tau
    expert, order = torch.where(kept, ids, experts).flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts, device=ids.device), right=True)
    return Sorted(order, expert, ends.int())


def grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[P, N]: rows [P, K] times the transposed [E, N, K], each row with its expert's."""
    function: Any = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    out: Tensor = function(rows, weight.transpose(-2, -1), offs=ends)
    return out


class OnLayer:
    """One more way to compute the layer, on its tensors; see `peers.Runtime`."""

    def __init__(self, name: str, layers: list[Layer], function: Function) -> None:
        self.name, self._layers, self._function = name, layers, function
        self.dtype = str(layers[0].down.dtype).removeprefix("torch.")
        self.weight_bytes = layers[0].down.itemsize

    def takes(self, _tokens: int, _ratio: float) -> bool:
        return True

    def work(self, routed: Routed, ratio: float, _threads: int) -> Callable[[], Tensor]:
        return partial(self._function, self._layers[routed.layer], routed.x, routed.ids, routed.weights, routed.tau[ratio])


def grouped_moe(layer: Layer, x: Tensor, ids: Tensor, weights: Tensor, tau: Tensor) -> Tensor:
    """[T, H]."""
    k = ids.shape[1]
    pairs = sort_pairs(ids, weights, tau, len(layer.down))
    gate, up = grouped_mm(x[pairs.order // k], layer.gate_up, pairs.ends).chunk(2, -1)
    rows = grouped_mm(silu(gate) * up, layer.down, pairs.ends) * weights.flatten()[pairs.order][:, None]
    rows = torch.where((pairs.expert < len(layer.down))[:, None], rows, 0)  # what was not computed is not even a number
    by_pair = torch.empty_like(rows)
    by_pair[pairs.order] = rows
    return by_pair.view(len(x), k, -1).sum(1)
