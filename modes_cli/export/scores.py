"""A formula's score as one node, where there is an operator for it."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from modes_cli.models.blocks import MoEBlock
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import Formula, chosen
from modes_cli.skipping.policies.predicted import PredictedNorm
from modes_cli.skipping.policies.salient import SalientNorm


def one_node(
    formula: Formula, own: Mapping[str, Tensor], block: MoEBlock, scale: Tensor, pairs: Pairs, weights: Tensor
) -> Tensor | None:
    """[T, k] float32: score_scale times the formula, in a graph of float32 that is traced; None where it takes plain nodes.

    Args:
        own: the layer's part of the formula's tensors.
        scale: the layer's score scale, (groups,) or (groups, experts).
        weights: [T, k], what pi is made of.
    """
    if type(formula) not in (PredictedNorm, SalientNorm) or (block.scales_input and block.top_k == 1):  # whose pi is the weight
        return None
    assert pairs.hidden is not None
    hidden = pairs.hidden.float()
    logits = F.linear(hidden, own["router"], own["router_bias"])
    salient = isinstance(formula, SalientNorm)
    found: Tensor = torch.ops.modes_trace.score(
        chosen(pairs), weights.float(), pairs.group, scale, hidden if salient else None, logits,
        own["coefficients"], own["range"], own["saliency"] if salient else None, own["saliency_range"] if salient else None,
        formula.parameters["power"] if salient else 0.0, block.top_k,
    )  # fmt: skip
    return found
