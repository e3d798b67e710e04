"""Importance per layer and token group, tempered: s = (kl[layer, group] / tokens[group]) ** power * pi.

`kl[layer, group]` is the damage when the tokens of one group (prompt text, vision, decode) lose a layer's routed experts. By
the number of the group's tokens it becomes the price of one token, which is what makes prompt text and decode comparable under
their common threshold: the few tokens that predict the answer are worth more than those that lead up to it. So decode is
skipped less than the rest; `--decode-target` gives it a threshold of its own.
"""

import torch
from torch import Tensor

from modes_cli.errors import BadOption
from modes_cli.models.groups import DECODE, GROUPS, TEXT, VISION
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, register, tempered

# Token group -> the column of the importance table in which that group alone loses its experts.
COLUMNS = {TEXT: "prompt", VISION: "vision", DECODE: "decode"}


@register("grouped")
class Grouped(Policy):
    variants = tuple({"power": power} for power in (0.25, 0.125, 0.5, 1.0))
    automatic = 3

    def __init__(self, power: float = 0.25) -> None:
        if not 0 <= power <= 1:
            raise BadOption(f"policy `{self.name}` with power `{power}`", hint="power is 0 to 1")
        super().__init__(power=float(power))

    def scale(self, measured: Measured) -> Tensor:
        return group_scale(measured, self.parameters["power"])


def group_scale(measured: Measured, power: float) -> Tensor:
    """(layers, groups) float64: (kl[layer, group] / tokens[group]) ** power, relative to the largest of them."""
    price = torch.zeros(measured.layers, len(GROUPS), dtype=torch.float64)
    for group, column in COLUMNS.items():
        price[:, group] = measured.damage(column) / max(1, measured.tokens(GROUPS[group]))
    scale = tempered(price / price.max().clamp_min(1e-300), power)
    rest = [group for group in range(len(GROUPS)) if group not in COLUMNS]
    scale[:, rest] = 1.0
    return scale
