"""The router of an MoE block, found by shape: the matrix that gives every expert a logit."""

from dataclasses import dataclass

from torch import Tensor, nn

from modes_cli.models.blocks import MoEBlock


@dataclass(frozen=True)
class Router:
    """logits = hidden @ weight.T + bias, before whatever the family does with them.

    Attributes:
        module: what holds `weight` (E, H), and where it has one, `bias` (E,).
    """

    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """Read anew each time: weights can be elsewhere (offloaded) while their layer does not run."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, E) float32 of hidden states (tokens, H)."""
        logits = hidden.float() @ self.weight.float().T
        bias = self.bias
        return logits if bias is None else logits + bias.float()

    @property
    def bias(self) -> Tensor | None:
        """A correction that only the choice of experts looks at has another name, and is none."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None


def find_router(model: nn.Module, block: MoEBlock) -> Router | None:
    """The router of a block; None where there is not exactly one matrix (E, H) outside its experts."""
    if block.further:
        return None  # several sets of experts, each with a router of its own
    experts = {id(module) for module in block.experts.modules()}
    shape = (block.num_experts, block.hidden_size)
    found = [
        module
        for module in model.get_submodule(block.moe).modules()
        if id(module) not in experts
        and any(name == "weight" and tuple(weight.shape) == shape for name, weight in module.named_parameters(recurse=False))
    ]
    return Router(found[0]) if len(found) == 1 else None
