"""Global-modulated local gating alone: s = alpha[layer] * pi, one threshold for all tokens (the paper's ablation)."""

from torch import Tensor

from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, by_modality, register


@register("gmlg")
class GlobalModulatedLocalGating(Policy):
    one_threshold = True

    def scale(self, measured: Measured) -> Tensor:
        alpha = measured.alpha("all")
        return by_modality(alpha, alpha)
