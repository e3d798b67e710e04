"""How many different experts a layer needs for a batch of tokens that are decoded together: what decode time follows.

At batch 16 and more nearly all experts may be needed by some token, and skipping saves only what no token needs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modes_cli.artifacts.thresholds import DistinctExperts
from modes_cli.models.groups import DECODE
from modes_cli.skipping.routing import Routing

Ids = NDArray[np.int64]

BATCHES = (1, 8, 64)
DRAWS = 64


class DecodeRouting:
    """Listens to the tokens of the group `decode`: their experts, and which of them a rule keeps.

    Args:
        layers, experts: how many MoE layers there are, and experts in each.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._layers, self._experts = layers, experts
        self._heard: list[list[Tensor]] = [[] for _ in range(layers)]

    def hear(self, routing: Routing) -> None:
        assert routing.keep is not None
        mine = routing.group == DECODE
        ids, keep = routing.experts[mine].long().cpu(), routing.keep[mine].cpu()
        self._heard[routing.layer].append(torch.stack([ids, torch.where(keep, ids, -1)]))

    def state(self) -> dict[str, Tensor]:
        nothing = torch.zeros(2, 0, 1, dtype=torch.int64)
        return {f"{layer}": torch.cat(heard, 1) if heard else nothing for layer, heard in enumerate(self._heard)}

    def take(self, everyone: Sequence[Mapping[str, Tensor]]) -> None:
        self._heard = [[one[f"{layer}"] for one in everyone if one[f"{layer}"].shape[1]] for layer in range(self._layers)]

    def count(self) -> list[DistinctExperts]:
        """Means over layers and random batches; empty where no token was decoded."""
        layers = [_sorted(torch.cat(heard, 1).numpy()) for heard in self._heard if heard]
        if not layers:
            return []
        return [
            DistinctExperts(
                batch=batch,
                full=float(np.mean([self._mean(ids, batch) for ids, _ in layers])),
                skipped=float(np.mean([self._mean(kept, batch) for _, kept in layers])),
            )
            for batch in BATCHES
        ]

    def _mean(self, ids: Ids, batch: int) -> float:
        """Mean number of different ids, but for -1, in rows drawn at random; the same draws for full and skipped."""
        generator = np.random.Generator(np.random.PCG64(0))
        again = len(ids) < batch
        total = 0
        for _ in range(DRAWS):
            rows = generator.choice(len(ids), batch, replace=again)
            total += len(np.setdiff1d(ids[rows], [-1]))
        return total / DRAWS


def _sorted(heard: Ids) -> Ids:
    """(2, tokens, k) by their values: in which order processes heard them makes no difference to the draws."""
    order = np.lexsort(np.concatenate([heard[0], heard[1]], 1).T)
    return heard[:, order]
