"""What is computed: sizes, random layers, random routings with an exact skip ratio, and the right answer in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import silu

from modes_cli.skipping.policy import routing_probability

# So many of few tokens that a routing's weights have left the cache when its turn comes again. Primes: see measure.py.
ROUTINGS = (17, 13, 11, 7, 5, 3, 2)
EXACT_PAIRS = 1 << 14
# Above these a runtime does not compute the same layer, and its times mean nothing. Relative to the largest output.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2, "float16/int8": 1e-1}


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `1024x384x64x8`: hidden, intermediate, experts, top-k. Raises ValueError."""
        sizes = [int(word) for word in text.split("x")]
        if len(sizes) != 4 or min(sizes) < 1 or sizes[3] > sizes[2]:
            raise ValueError(f"`{text}` is not HxIxExK with K <= E")
        return cls(*sizes)

    def __str__(self) -> str:
        return f"{self.hidden}x{self.intermediate}x{self.experts}x{self.top_k}"

    @property
    def expert_parameters(self) -> int:
        return 3 * self.hidden * self.intermediate


@dataclass(frozen=True)
class Layer:
    """gate_up [E, 2I, H] and down [E, H, I], as a checkpoint has them."""

    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Routed:
    """Tokens of one call. Thresholds and kept pairs by skip ratio; ratio 0 keeps all.

    Attributes:
        layer: which of the layers they are for.
        x: [T, H]. ids: [T, k] int64. weights: [T, k], top-k softmax, normalised.
        group: [T] int32, all 0. scale: [1] float32, 1.
        tau: ratio -> [1] float32. keep: ratio -> [T, k] bool.
    """

    layer: int
    x: Tensor
    ids: Tensor
    weights: Tensor
    group: Tensor
    scale: Tensor
    tau: dict[float, Tensor]
    keep: dict[float, Tensor]

    def to(self, device: str) -> Self:
        moved = {name: getattr(self, name).to(device) for name in ("x", "ids", "weights", "group", "scale")}
        for name in ("tau", "keep"):
            moved[name] = {ratio: value.to(device) for ratio, value in getattr(self, name).items()}
        return replace(self, **moved)

    def of_tokens(self, tokens: Tensor) -> Self:
        """The same for some of the tokens only: what is computed for one does not depend on the others."""
        some = {name: getattr(self, name)[tokens] for name in ("x", "ids", "weights", "group")}
        return replace(self, **some, keep={ratio: keep[tokens] for ratio, keep in self.keep.items()})

    def kept(self, ratio: float) -> int:
        return int(self.keep[ratio].sum())

    def distinct_experts(self, ratio: float) -> int:
        return int(self.ids[self.keep[ratio]].bincount().count_nonzero())


def random_layers(shape: Shape, dtype: torch.dtype, count: int, device: str = "cpu") -> list[Layer]:
    """Layers whose outputs are about as large as their inputs."""
    g = torch.Generator(device).manual_seed(0)
    H, I, E = shape.hidden, shape.intermediate, shape.experts  # noqa: E741
    return [
        Layer(
            torch.empty(E, 2 * I, H, dtype=dtype, device=device).normal_(0, H**-0.5, generator=g),
            torch.empty(E, H, I, dtype=dtype, device=device).normal_(0, 2 * I**-0.5, generator=g),
        )
        for _ in range(count)
    ]


def layers_needed(shape: Shape, dtype: torch.dtype, cache: int) -> int:
    """So many that their weights are several times the last cache of `cache` bytes; not more than four."""
    return max(1, min(4, math.ceil(16 * cache / (shape.experts * shape.expert_parameters * dtype.itemsize))))


def random_routings(
    shape: Shape, dtype: torch.dtype, tokens: int, ratios: Sequence[float], layers: int, count: int | None = None
) -> list[Routed]:
    """Inputs for calls in turn, a prime number of them. One token has other experts in each, as long as there are some."""
    most = layers * (shape.experts // shape.top_k) if tokens == 1 else ROUTINGS[0] if tokens <= 8 else 5
    count = next((prime for prime in ROUTINGS if prime <= most), 1) if count is None else min(count, most)
    g = torch.Generator().manual_seed(tokens)
    orders = [torch.randperm(shape.experts, generator=g) for _ in range(layers)]
    found = []
    for i in range(count):
        layer, first = i % layers, i // layers * shape.top_k
        only = orders[layer][first : first + shape.top_k] if tokens == 1 else None
        found.append(_routed(shape, dtype, tokens, ratios, layer, only, g))
    return found


def _routed(
    shape: Shape, dtype: torch.dtype, tokens: int, ratios: Sequence[float], layer: int, only: Tensor | None, g: torch.Generator
) -> Routed:
    """`only`: [k] the experts of the one token, so that calls in turn read different weights."""
    for _ in range(100):
        weights, ids = torch.randn(tokens, shape.experts, generator=g).softmax(-1).topk(shape.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)
        tau = {ratio: _threshold(weights, ratio) for ratio in ratios}
        keep = {ratio: routing_probability(weights) >= tau[ratio] for ratio in ratios}
        # No tie at a threshold. Among very many pairs in two bytes there always is one, and it hardly matters.
        allowed = 0 if weights.numel() <= EXACT_PAIRS else weights.numel() // 500
        if all(abs(int(keep[ratio].sum()) - _wanted(weights, ratio)) <= allowed for ratio in ratios):
            x = torch.randn(tokens, shape.hidden, generator=g).to(dtype)
            ids = ids if only is None else only[None]
            return Routed(layer, x, ids, weights, torch.zeros(tokens, dtype=torch.int32), torch.ones(1), tau, keep)
    raise RuntimeError(f"100 random routings of {tokens} tokens all have ties at a threshold")


def _wanted(weights: Tensor, ratio: float) -> int:
    """Pairs to keep: at least one."""
    return max(1, round(weights.numel() * (1 - ratio)))


def _threshold(weights: Tensor, ratio: float) -> Tensor:
    """[1] half way between the last score that is kept and the first that is not; 0 if all are."""
    scores = routing_probability(weights).flatten().sort(descending=True).values
    kept = _wanted(weights, ratio)
    return torch.zeros(1) if kept == len(scores) else (scores[kept - 1 : kept] + scores[kept : kept + 1]) / 2


def reference(layer: Layer, routed: Routed, ratio: float) -> Tensor:
    """[T, H] float64: the kept pairs, one expert after the other."""
    out = torch.zeros(routed.x.shape, dtype=torch.float64, device=routed.x.device)
    chosen = torch.where(routed.keep[ratio], routed.ids, -1)
    for e in range(len(layer.down)):
        token, slot = (chosen == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        gate, up = (routed.x[token].double() @ layer.gate_up[e].double().T).chunk(2, -1)
        rows = (silu(gate) * up) @ layer.down[e].double().T
        out.index_add_(0, token, rows * routed.weights[token, slot].double()[:, None])
    return out


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest magnitude of the reference."""
    return float((actual.double() - expected).abs().max() / expected.abs().max())
