"""Predicted damage: s = pi ** 1.5 * n(x) * u(x) ** power, where n(x) is the predicted norm of what the expert returns for this
token, and u(x) the predicted saliency of the token in this layer and group: how much the answer depends on what the layer's
experts return for it (`modes_cli.calibration.saliency`). It takes MoDES's importance per layer (arXiv:2511.15690, eq. 2) to
every token.

To the first order, leaving a pair out moves the answer by |<gradient, pi * E(x)>|, which pi * n * u bounds. A token's several
dropped pairs add up, and the small ones are dropped together: pi ** 1.5 prices them lower (on the built-in model better
than 1 and as good as 2). Layers, groups and tokens are comparable by u, so there is no other scale.

Both predictions are linear in what the experts are given; outside of what was seen they are moved to its edge. They cost what
two routers cost, and a scalar product per token and group.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modes_cli.errors import BadOption
from modes_cli.models.groups import GROUPS, SPECIAL
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import ONE, Sizes
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policies.predicted import Predicted, PredictedNorm
from modes_cli.skipping.policy import Policy, register

LOWEST = -24.0  # of a log-saliency relative to the group's largest


class SalientNorm(PredictedNorm):
    """pi ** 1.5 * n(x) * u(x) ** power, n relative to its largest in the layer, u to that of the layer's group.

    Tensors: those of `PredictedNorm`, `saliency` (layers, groups, H + 1), and `saliency_range` (layers, groups, 2).
    """

    @classmethod
    def shapes(cls, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        groups = len(GROUPS)
        return super().shapes(sizes) | {"saliency": (groups, sizes.hidden + 1), "saliency_range": (groups, 2)}

    def of(self, own: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        assert pairs.hidden is not None, "this rule looks at hidden states"
        group = pairs.group.long() % len(GROUPS)  # padding has groups of its own on a GPU
        weights = own["saliency"]
        every = pairs.hidden.float() @ weights[:, :-1].T + weights[:, -1]
        predicted = every.gather(1, group[:, None])
        low, high = own["saliency_range"].index_select(0, group).unbind(1)
        relative = torch.minimum(torch.maximum(predicted, low[:, None]), high[:, None]) - high[:, None]
        found = super().of(own, pairs) * torch.sqrt(pairs.pi) * torch.exp(self.parameters["power"] * relative)
        return found.clamp_min(1 / ONE)


@register("salient")
class Salient(Policy):
    variants = tuple({"power": power} for power in (0.7, 1.0))
    formula = SalientNorm
    automatic = 1

    def __init__(self, power: float = 0.7) -> None:
        if not 0 <= power <= 2:
            raise BadOption(f"policy `salient` with power `{power}`", hint="power is 0 to 2")
        super().__init__(power=float(power))

    def tensors(self, measured: Measured) -> dict[str, Tensor]:
        layers, groups = measured.layers, len(GROUPS)
        weights = measured.tensor("saliency", (layers, groups, -1))  # says why, if it is not there
        return Predicted().tensors(measured) | {"saliency": weights, "saliency_range": _range(measured)[:, :, :2]}

    def scale(self, measured: Measured) -> Tensor:
        """The largest norm of each layer times the largest u of each cell; 0 where no answer depends on any token."""
        norms = Predicted().tensors(measured)["range"][:, 1]
        high, alive = _range(measured)[:, :, 1], _range(measured)[:, :, 2] > 0
        most = high[alive].max() if bool(alive.any()) else torch.zeros(())
        scale = torch.exp(self.parameters["power"] * (high - most).clamp_min(LOWEST)) * alive
        scale[:, SPECIAL] = 1.0
        return scale * torch.exp(norms - norms.max())[:, None]


def _range(measured: Measured) -> Tensor:
    """(layers, groups, 3) float64: smallest and largest log-saliency, and the share of tokens that have any."""
    return measured.tensor("saliency_range", (measured.layers, len(GROUPS), 3))
