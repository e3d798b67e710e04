"""A floor for comparisons: each pair's score is a hash of its token's routing and its expert, uniform in (0, 1].

tau is the share of pairs that is skipped. Deterministic; `seed` gives another choice. The hash looks at bits: another runtime,
whose last bits differ, takes other pairs, equally many.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modes_cli.errors import BadOption
from modes_cli.models.groups import GROUPS
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import Formula, chosen, mix, token_hash, uniform
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, register

_SEEDS = 2**20


class Hashed(Formula):
    def of(self, own: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        token = token_hash(pairs, salt=1 + int(self.parameters["seed"]))
        return 1.0 - uniform(mix(token + mix(chosen(pairs) + 1)))


@register("random")
class Random(Policy):
    one_threshold = True
    formula = Hashed

    def __init__(self, seed: float = 0) -> None:
        if not (0 <= seed < _SEEDS and seed == int(seed)):
            raise BadOption(f"policy `random` with seed `{seed}`", hint=f"a seed is a whole number, 0 to {_SEEDS - 1}")
        super().__init__(seed=float(seed))

    def scale(self, measured: Measured) -> Tensor:
        return torch.ones(measured.layers, len(GROUPS), dtype=torch.float64)
