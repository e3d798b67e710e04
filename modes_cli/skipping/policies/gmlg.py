"""Global-modulated local gating alone: s = alpha[layer] * pi, one threshold for all tokens (the paper's ablation)."""

from torch import Tensor

from modes_cli.skipping.policy import Policy, register


@register("gmlg")
class GlobalModulatedLocalGating(Policy):
    one_threshold = True

    def scale(self, importance: Tensor) -> Tensor:
        return importance[:, :1].expand(-1, 2)
