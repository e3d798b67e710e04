"""`torch.ops.modes.skip_experts` in compiled and exported modules, and experts that were checked once."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from modes_cli.errors import KernelError
from modes_cli.runtime import kernels
from tests.kernels.reference import ALPHA, LIMIT, Case, assert_close, random_case

OPERATOR = torch.ops.modes.skip_experts
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no g++")]),
]


def routing(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case.x, case.expert_ids, case.expert_weights, case.group


def rest(case: Case) -> tuple[object, ...]:
    return (
        case.tau, case.score_scale, case.gate_up, case.down, case.gate_up_bias, case.down_bias, case.activation, ALPHA, LIMIT,
        case.transposed, case.interleaved,
    )  # fmt: skip


class Layer(torch.nn.Module):
    """The operator between other work; with scores of its own, or with those of the definition."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.rest, self.own = rest(case), case.score is not None

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, group: Tensor, score: Tensor) -> Tensor:
        out: Tensor = OPERATOR(
            x, expert_ids, expert_weights, group, *self.rest, **({"score": score.sigmoid() * 2} if self.own else {})
        )
        return out * 2


def expected(case: Case, score: Tensor) -> Tensor:
    return 2 * experts(case)(
        *routing(case), case.tau, case.score_scale, score=None if case.score is None else score.sigmoid() * 2
    )


def experts(case: Case) -> kernels.Experts:
    return kernels.Experts(
        case.gate_up, case.down, case.gate_up_bias, case.down_bias, case.activation, ALPHA, LIMIT,
        case.transposed, case.interleaved,
    )  # fmt: skip


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, own: bool) -> None:
    case = random_case(biases=True, dtype=dtype, weight_dtype=torch.bfloat16, explicit_score=own)
    torch.library.opcheck(OPERATOR.default, (*routing(case), *rest(case)), {"score": case.score})


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_a_compiled_layer_is_one_graph(backend: str, own: bool) -> None:
    torch._dynamo.reset()
    case = random_case(biases=True, explicit_score=own)
    score = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(Layer(case), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*routing(case), score), expected(case, score))


@pytest.mark.parametrize("own", [False, True])
def test_an_exported_layer_takes_any_number_of_tokens(own: bool) -> None:
    case = random_case(biases=True, explicit_score=own)
    score = torch.zeros(9, 3)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Layer(case), (*routing(case), score), dynamic_shapes=({0: tokens},) * 5)
    names = ("score_scale", "gate_up", "down", "gate_up_bias", "down_bias")
    for count in (2, 21):
        longer = random_case(tokens=count, explicit_score=own).but(**{name: getattr(case, name) for name in names})
        score = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
        assert torch.equal(program.module()(*routing(longer), score), expected(longer, score))


def test_experts_checked_once_compute_as_those_checked_every_time() -> None:
    for layout in ({"transposed": True, "interleaved": True, "activation": "swiglu_oai", "biases": True}, {}):
        case = random_case(**layout)  # type: ignore[arg-type]
        prepared = experts(case)
        for seed in range(3):
            other = random_case(tokens=5 + seed, seed=seed, id_dtype=torch.int32)
            call = (*routing(other), other.tau, other.score_scale)
            kept = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
            out = prepared(*call, kept=kept[0])
            assert torch.equal(out, kernels.skip_experts(*call, *rest(case)[2:], kept=kept[1]))  # type: ignore[arg-type]
            assert torch.equal(*kept)
        assert_close(prepared(*routing(case), case.tau, case.score_scale), case)


def test_experts_are_used_from_many_threads() -> None:
    case = random_case(tokens=50, hidden=96, intermediate=96)
    prepared = experts(case)
    wanted = prepared(*routing(case), case.tau, case.score_scale)
    with ThreadPoolExecutor(6) as pool:
        for out in pool.map(lambda _: prepared(*routing(case), case.tau, case.score_scale), range(24)):
            assert torch.equal(out, wanted)


def test_experts_whose_weights_changed_place_are_refused() -> None:
    case = random_case(biases=True)
    call = (*routing(case), case.tau, case.score_scale)
    weights = [case.gate_up, case.down, case.gate_up_bias, case.down_bias]
    prepared = kernels.Experts(*weights)  # type: ignore[arg-type]
    assert prepared.stands_for(*weights)
    assert not prepared.stands_for(*weights[:2], None, None)
    assert not prepared.stands_for(*[w.clone() for w in weights])  # type: ignore[union-attr]
    case.down.mul_(2)  # in place: the same memory
    assert_close(prepared(*call), case)
    old, case.down.data = case.down.data, case.down.data.clone()
    assert not prepared.stands_for(*weights)
    with pytest.raises(KernelError, match="freed or replaced"):
        prepared(*call)
    case.down.data = old
    prepared(*call)
    del weights, case
    with pytest.raises(KernelError, match="freed or replaced"):
        prepared(*call)
