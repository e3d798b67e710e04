"""Expected contribution: s = scale * pi * mean ||E(x)||, the norm of what an expert returns, by layer, group and expert.

What a pair adds to its token is pi * E(x), so pi alone overrates experts with small outputs. The scale is that of `grouped`,
(kl[layer, group] / tokens[group]) ** power, or with `grouped` 0, alpha[layer] ** power.
"""

from torch import Tensor

from modes_cli.errors import BadOption
from modes_cli.models.groups import GROUPS
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policies.grouped import group_scale
from modes_cli.skipping.policy import Policy, by_modality, register, tempered


@register("norm")
class Norm(Policy):
    variants = tuple({"power": power, "grouped": 1.0} for power in (0.25, 0.5))
    automatic = 4

    def __init__(self, power: float = 0.25, grouped: float = 1.0) -> None:
        if not 0 <= power <= 1 or grouped not in (0, 1):
            raise BadOption(
                f"policy `norm` with power `{power}` and grouped `{grouped}`", hint="power is 0 to 1, grouped 0 or 1"
            )
        super().__init__(power=float(power), grouped=float(grouped))

    def scale(self, measured: Measured) -> Tensor:
        power = self.parameters["power"]
        alpha = tempered(measured.alpha("all"), power)
        scale = group_scale(measured, power) if self.parameters["grouped"] else by_modality(alpha, alpha)
        norms = measured.tensor("output_norm", (measured.layers, len(GROUPS), measured.calibration.experts))
        return scale[:, :, None] * norms / norms.max().clamp_min(1e-300)
