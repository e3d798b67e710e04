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
    """The router of a block: the matrix (E, H) outside its experts that is nearest to the block itself, as a shared expert can
    have one of that shape inside. None where there is none, or two equally near.
    """
    if block.further:
        return None  # several sets of experts, each with a router of its own
    experts = {id(module) for module in block.experts.modules()}
    shape = (block.num_experts, block.hidden_size)
    found: dict[int, list[nn.Module]] = {}  # by depth
    for path, module in model.get_submodule(block.moe).named_modules():
        own = dict(module.named_parameters(recurse=False))
        if id(module) not in experts and "weight" in own and tuple(own["weight"].shape) == shape:
            found.setdefault(path.count("."), []).append(module)
    nearest = found[min(found)] if found else []
    return Router(nearest[0]) if len(nearest) == 1 else None
