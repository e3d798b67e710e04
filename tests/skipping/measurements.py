"""Made-up calibrations for policies: importance, token counts and tensors, without a model."""

from typing import Any

import torch
from torch import Tensor

from modes_cli.artifacts import Calibration
from modes_cli.artifacts.base import TensorFile
from modes_cli.artifacts.calibration import LayerImportance
from modes_cli.models.groups import GROUPS
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import routing_probability

LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 12, 4, 8
COLUMNS = ("all", "text", "vision", "prompt", "decode")
TOKENS = {"text": 300, "vision": 900, "decode": 60, "audio": 0, "special": 40}


def random(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def measured(kl: Tensor | None = None, **tensors: Tensor) -> Measured:
    """Args: kl: (LAYERS, 5), mean KL by column; left out: random ones. tensors: instead of the usual ones."""
    kl = 0.01 + random(5, LAYERS, len(COLUMNS)) if kl is None else kl
    share = kl / kl.sum(0).clamp_min(1e-30)
    importance = {
        str(layer): LayerImportance(
            **{name: float(share[layer, i]) for i, name in enumerate(COLUMNS)},
            **{f"kl_{name}": float(kl[layer, i]) for i, name in enumerate(COLUMNS)},
        )
        for layer in range(LAYERS)
    }
    fields: dict[str, Any] = {"moe_layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "groups": list(GROUPS)}
    file = TensorFile(file="calibration.safetensors", sha256="0" * 64, bytes=1)
    made = Calibration.model_construct(**fields, importance=importance, tokens=TOKENS, tensors=file)
    return Measured(made, None, {**usual_tensors(), **tensors})


def usual_tensors() -> dict[str, Tensor]:
    ratio = random(6, LAYERS, TOP_K).sort(1, descending=True).values
    ratio[:, 0] = 1.0
    low = -1 - random(7, LAYERS)
    return {
        "slot_ratio": ratio,
        "expert_similarity": 2 * random(8, LAYERS, EXPERTS, EXPERTS) - 1,
        "output_norm": 0.1 + random(9, LAYERS, len(GROUPS), EXPERTS),
        "norm_predictor": random(10, LAYERS, EXPERTS, EXPERTS + 2) - 0.5,
        "norm_range": torch.stack([low, low + 2 + random(11, LAYERS)], 1),
        "router": random(12, LAYERS, EXPERTS, HIDDEN) - 0.5,
        "router_bias": random(13, LAYERS, EXPERTS) - 0.5,
        "saliency": random(14, LAYERS, len(GROUPS), HIDDEN + 1) - 0.5,
        "saliency_range": saliency_range(),
    }


def saliency_range() -> Tensor:
    """(LAYERS, groups, 3); no answer depends on what the last layer does for text."""
    low = -6 - random(15, LAYERS, len(GROUPS))
    found = torch.stack([low, low + 4 * random(16, LAYERS, len(GROUPS)), torch.ones_like(low)], -1)
    found[-1, 0] = 0.0
    return found


def pairs(seed: int, tokens: int = 20, layer: int = 0, *, ties: bool = False, top_k: int = TOP_K) -> Pairs:
    """Random routing; with `ties`, of few different weights."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :top_k]
    weights = torch.randint(1, 4, (tokens, top_k), generator=generator).float()
    if not ties:
        weights = torch.randn(tokens, top_k, generator=generator).mul(2).softmax(-1)
    group = torch.randint(0, len(GROUPS), (tokens,), generator=generator)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    pi = routing_probability(weights) if tokens else weights
    return Pairs(layer, pi, group, order, hidden, torch.rand(tokens, generator=generator))


def in_another_order(many: Pairs, slots: Tensor) -> Pairs:
    """The same tokens with their slots in another order; `slots` (tokens, k)."""
    assert many.experts is not None
    pi, experts = many.pi.gather(1, slots), many.experts.gather(1, slots)
    return Pairs(many.layer, pi, many.group, experts, many.hidden, many.standing)
