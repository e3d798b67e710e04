"""Tempered MoDES: s = alpha[layer] ** power * pi, one threshold per modality.

alpha prices the loss of a whole layer, so alpha * pi keeps even the weakest experts of an important layer and empties the
others. A power below 1 lessens that; 0 is `dmt`, 1 is `modes`. With `per_modality` 1, alpha is measured per layer and
modality, as the authors' release does: s = alpha[layer, modality] ** power * pi.
"""

from torch import Tensor

from modes_cli.errors import BadOption
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, by_modality, register, tempered


@register("tempered")
class Tempered(Policy):
    variants = tuple({"power": power, "per_modality": by} for power in (0.25, 0.5, 0.125) for by in (0.0, 1.0))
    automatic = 5

    def __init__(self, power: float = 0.25, per_modality: float = 0.0) -> None:
        if not 0 <= power <= 1 or per_modality not in (0, 1):
            raise BadOption(
                f"policy `tempered` with power `{power}` and per_modality `{per_modality}`",
                hint="power is 0 to 1, per_modality 0 or 1",
            )
        super().__init__(power=float(power), per_modality=float(per_modality))

    def scale(self, measured: Measured) -> Tensor:
        power = self.parameters["power"]
        text, vision = ("text", "vision") if self.parameters["per_modality"] else ("all", "all")
        return by_modality(tempered(measured.alpha(text), power), tempered(measured.alpha(vision), power))
