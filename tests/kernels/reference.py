"""The operator's definition in plain torch, and random layers to compare on.

Twice: one pair at a time in float32, the plain reading of kernels/include/modes.h; one expert at a time in float64, for
large layers and for measuring rounding.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai")
ALPHA, LIMIT = 1.702, 7.0


@dataclass(frozen=True)
class Case:
    """Arguments of the operator, under its names. Shapes as in kernels/include/modes.h."""

    x: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    group: Tensor
    tau: Tensor
    score_scale: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"
    transposed: bool = False
    interleaved: bool = False
    score: Tensor | None = None
    gate_up_scales: Tensor | None = None  # of quantised weights, which `quantised` makes; the definitions below take floats
    down_scales: Tensor | None = None
    block: int = 0

    def but(self, **changes: object) -> "Case":
        return replace(self, **changes)


def keep_mask(case: Case) -> Tensor:
    """[T, k] bool: which pairs are kept. The sum is sequential, in slot order, in float32, as the kernel's is."""
    T, k = case.expert_ids.shape
    if case.score is None:
        w = case.expert_weights.float()
        total = torch.zeros(T)
        for j in range(k):
            total = total + w[:, j]
        pi = w / total[:, None]
        group = case.group.long()
        if case.score_scale.dim() == 2:
            score = case.score_scale[group[:, None], case.expert_ids.long()] * pi
        else:
            score = case.score_scale[group][:, None] * pi
    else:
        score = case.score
    return ~(score < case.tau[case.group.long()][:, None])  # a comparison with NaN keeps


def expert(case: Case, e: int, v: Tensor) -> Tensor:
    """[..., H]: expert e of tokens [..., H], in their dtype, which the case's weights have too."""
    gate_up, down = case.gate_up[e], case.down[e]
    if case.transposed:
        gate_up, down = gate_up.T, down.T
    both = v @ gate_up.T
    if case.gate_up_bias is not None:
        both = both + case.gate_up_bias[e].to(v.dtype)
    gate, up = (both[..., 0::2], both[..., 1::2]) if case.interleaved else both.chunk(2, dim=-1)
    if case.activation == "silu":
        inner = torch.nn.functional.silu(gate) * up
    elif case.activation == "gelu_tanh":
        inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
    else:
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        inner = gate * torch.sigmoid(ALPHA * gate) * (up + 1)
    out = inner @ down.T
    return out if case.down_bias is None else out + case.down_bias[e].to(v.dtype)


def skip_experts(case: Case) -> Tensor:
    """[T, H] in x's dtype."""
    keep, w = keep_mask(case), case.expert_weights.float()
    case = case.but(gate_up=case.gate_up.float(), down=case.down.float())
    out = torch.zeros(case.x.shape)
    for t in range(case.x.shape[0]):
        for j in range(case.expert_ids.shape[1]):
            if keep[t, j]:
                out[t] = out[t] + w[t, j] * expert(case, int(case.expert_ids[t, j]), case.x[t].float())
    return out.to(case.x.dtype)


def skip_experts_float64(case: Case) -> Tensor:
    """[T, H] float64."""
    keep, w, x = keep_mask(case), case.expert_weights.double(), case.x.double()
    case = case.but(gate_up=case.gate_up.double(), down=case.down.double())
    out = torch.zeros(case.x.shape, dtype=torch.float64)
    for e in range(case.down.shape[0]):
        t, j = (keep & (case.expert_ids == e)).nonzero(as_tuple=True)
        if len(t):
            out.index_add_(0, t, w[t, j, None] * expert(case, e, x[t]))
    return out


def kept_pairs(case: Case) -> Tensor:
    """[G] int64: kept pairs of each group."""
    return torch.zeros(case.tau.shape[0], dtype=torch.int64).index_add(0, case.group.long(), keep_mask(case).sum(-1))


def random_case(
    *,
    tokens: int = 9,
    hidden: int = 24,
    intermediate: int = 16,
    experts: int = 6,
    top_k: int = 3,
    groups: int = 2,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    id_dtype: torch.dtype = torch.int64,
    activation: str = "silu",
    transposed: bool = False,
    interleaved: bool = False,
    biases: bool = False,
    per_expert: bool = False,
    explicit_score: bool = False,
    tau: float = 0.2,
    seed: int = 0,
) -> Case:
    """A layer with outputs of about 1, and thresholds near `tau` that keep some pairs and skip others."""
    g = torch.Generator().manual_seed(seed)
    T, H, I, E = tokens, hidden, intermediate, experts  # noqa: E741

    def normal(*shape: int, scale: float, to: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(to)

    return Case(
        x=normal(T, H, scale=1.0, to=dtype),
        expert_ids=torch.randint(0, E, (T, top_k), generator=g).to(id_dtype),
        expert_weights=(torch.randn(T, top_k, generator=g).softmax(-1) * 1.5).to(dtype),
        group=torch.randint(0, groups, (T,), generator=g).to(torch.int32),
        tau=torch.full((groups,), tau) * torch.linspace(0.5, 1.5, groups),
        score_scale=torch.rand(*((groups, E) if per_expert else (groups,)), generator=g) + 0.5,
        gate_up=normal(E, *((H, 2 * I) if transposed else (2 * I, H)), scale=2.0 / H**0.5, to=weight_dtype),
        down=normal(E, *((I, H) if transposed else (H, I)), scale=2.0 / I**0.5, to=weight_dtype),
        gate_up_bias=normal(E, 2 * I, scale=0.5, to=weight_dtype) if biases else None,
        down_bias=normal(E, H, scale=0.5, to=weight_dtype) if biases else None,
        activation=activation,
        transposed=transposed,
        interleaved=interleaved,
        score=torch.rand(T, top_k, generator=g) if explicit_score else None,
    )


def assert_close(actual: Tensor, case: Case) -> None:
    """Equal to the float32 reference within the rounding of x's dtype; names the first element that is not."""
    _compare(actual, skip_experts(case), case)


def assert_close_to_float64(actual: Tensor, case: Case) -> None:
    """The same for larger layers."""
    _compare(actual, skip_experts_float64(case), case)


def error(actual: Tensor, case: Case) -> float:
    """Largest absolute error over the largest absolute value, against float64."""
    expected = skip_experts_float64(case)
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def _compare(actual: Tensor, expected: Tensor, case: Case) -> None:
    assert actual.dtype == case.x.dtype
    assert actual.shape == expected.shape
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[case.x.dtype]
    a, b = actual.double(), expected.double()
    wrong = (a - b).abs() > tolerance * (1 + b.abs().amax(-1, keepdim=True))  # sums cancel: relative to the token's largest
    wrong |= a.isnan() != b.isnan()
    if wrong.any():
        t, c = (int(i) for i in wrong.nonzero()[0])
        raise AssertionError(f"{int(wrong.sum())} elements differ, first out[{t}, {c}]: {a[t, c]} instead of {b[t, c]}")
