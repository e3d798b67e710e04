"""Predicted contribution: s = scale * pi * n(x), where n(x) is the predicted norm of what the expert returns for this token.

log n is linear in the router's logits, the log of the softmax mass of the token's top-k, and 1, with coefficients of each
expert from a ridge regression on the calibration set (`modes_cli.calibration.ridge`); predictions outside what was measured
there are moved to its edge. The scale is that of `grouped`: (kl[layer, group] / tokens[group]) ** power.

The formula has the router among its tensors and computes the logits itself: it costs what two routers cost.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modes_cli.errors import BadOption
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import Formula, Sizes, chosen
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policies.grouped import group_scale
from modes_cli.skipping.policy import Policy, register
from modes_cli.skipping.predictor import features, log_norms


class PredictedNorm(Formula):
    """pi * n(x) / largest norm of the layer.

    Tensors: `router` (layers, E, H), `router_bias` (layers, E), `coefficients` (layers, E, E + 2), and `range` (layers, 2), the
    smallest and the largest log-norm that was measured.
    """

    @classmethod
    def shapes(cls, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        experts = sizes.experts
        weights = {"router": (experts, sizes.hidden), "router_bias": (experts,), "coefficients": (experts, experts + 2)}
        return weights | {"range": (2,)}

    def of(self, own: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        assert pairs.hidden is not None, "this rule looks at hidden states"
        experts = chosen(pairs)
        logits = pairs.hidden.float() @ own["router"].T + own["router_bias"]
        predicted = log_norms(features(logits, experts), own["coefficients"], experts)
        low, high = own["range"].unbind(0)
        return pairs.pi * torch.exp(torch.minimum(torch.maximum(predicted, low), high) - high)


@register("predicted")
class Predicted(Policy):
    variants = tuple({"power": power} for power in (0.25, 0.5))
    formula = PredictedNorm
    automatic = 2

    def __init__(self, power: float = 0.25) -> None:
        if not 0 <= power <= 1:
            raise BadOption(f"policy `predicted` with power `{power}`", hint="power is 0 to 1")
        super().__init__(power=float(power))

    def tensors(self, measured: Measured) -> dict[str, Tensor]:
        layers, experts = measured.layers, measured.calibration.experts
        coefficients = measured.tensor("norm_predictor", (layers, experts, experts + 2))  # says why, if it is not there
        return {
            "router": measured.tensor("router", (layers, experts, -1)),
            "router_bias": measured.tensor("router_bias", (layers, experts)),
            "coefficients": coefficients,
            "range": _range(measured),
        }

    def scale(self, measured: Measured) -> Tensor:
        largest = _range(measured)[:, 1]
        return group_scale(measured, self.parameters["power"]) * torch.exp(largest - largest.max())[:, None]


def _range(measured: Measured) -> Tensor:
    """(layers, 2) float64: smallest and largest log-norm."""
    return measured.tensor("norm_range", (measured.layers, 2))
