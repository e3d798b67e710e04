"""MC-MoE: NAEE's rule, except for the tokens that matter most, which keep all their experts.

Huang et al., "Mixture Compressor for Mixture-of-Experts LLMs Gains More", arXiv:2410.06270, Online Dynamic Pruning: a token's
importance is the attention that it receives, averaged over the tokens that see it and over heads, times the L1 norm of its
hidden state; the 2% most important tokens of a sequence are protected. A token that is decoded alone is not among them.

That takes whole attention matrices, which only eager attention gives: no graph and no kernel has them, so this policy runs in
PyTorch alone.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from modes_cli.errors import BadOption, ModesError
from modes_cli.models.groups import GROUPS
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policies.naee import NAEE, Ratio, betas
from modes_cli.skipping.policy import Policy, register


class ProtectedRatio(Ratio):
    needs_attention: ClassVar[bool] = True

    def of(self, own: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        if pairs.standing is None:
            raise ModesError("policy `mcmoe` was not given any attention", hint="it runs in PyTorch only")
        protected = (pairs.standing < self.parameters["protected"])[:, None]
        return torch.where(protected, 1.0, super().of(own, pairs))


@register("mcmoe")
class MCMoE(Policy):
    one_threshold = True
    formula = ProtectedRatio
    obstacle = "it looks at attention weights, which exported graphs and fast attention kernels do not give"

    def __init__(self, protected: float = 0.02) -> None:
        if not 0 <= protected <= 1:
            raise BadOption(f"policy `mcmoe` with protected `{protected}`", hint="protected is a share of tokens, 0 to 1")
        super().__init__(protected=float(protected))

    def tensors(self, measured: Measured) -> dict[str, Tensor]:
        return NAEE().tensors(measured)

    def scale(self, measured: Measured) -> Tensor:
        return (2.0 / betas(measured).amin(1, keepdim=True)).expand(-1, len(GROUPS)).contiguous()
