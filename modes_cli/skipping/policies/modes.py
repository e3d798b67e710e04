"""MoDES: s = alpha[layer] * pi, one threshold per modality (Huang et al. 2025, eq. 3 and 5).

The paper measures alpha over all tokens. The authors' release measures it per modality too; that is policy `tempered`
with `per_modality` 1 and power 1.
"""

from torch import Tensor

from modes_cli.skipping.policy import Policy, register


@register("modes")
class Modes(Policy):
    def scale(self, importance: Tensor) -> Tensor:
        return importance[:, :1].expand(-1, 2)
