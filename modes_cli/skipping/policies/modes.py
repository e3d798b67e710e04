"""MoDES: s = alpha[layer] * pi, one threshold per modality (Huang et al. 2025, eq. 3 and 5).

The paper measures alpha over all tokens. The authors' release measures it per modality too; that is `per_modality` 1:
s = alpha[layer, modality] * pi.
"""

from torch import Tensor

from modes_cli.errors import BadOption
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, by_modality, register


@register("modes")
class Modes(Policy):
    variants = ({"per_modality": 0.0}, {"per_modality": 1.0})
    automatic = 7

    def __init__(self, per_modality: float = 0.0) -> None:
        if per_modality not in (0, 1):
            raise BadOption(f"policy `modes` with per_modality `{per_modality}`", hint="per_modality is 0 or 1")
        super().__init__(per_modality=float(per_modality))

    def scale(self, measured: Measured) -> Tensor:
        text, vision = ("text", "vision") if self.parameters["per_modality"] else ("all", "all")
        return by_modality(measured.alpha(text), measured.alpha(vision))
