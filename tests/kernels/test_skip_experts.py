"""The CPU operator against its plain definition, on random layers and at its edges."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from modes_cli.errors import KernelError
from modes_cli.runtime import kernels
from tests.kernels.calling import FLOATS, run
from tests.kernels.reference import (
    ACTIVATIONS,
    ALPHA,
    LIMIT,
    Case,
    assert_close,
    error,
    keep_mask,
    kept_pairs,
    random_case,
)

INF = float("inf")


def operator_arguments(case: Case) -> tuple[object, ...]:
    return (
        case.x, case.expert_ids, case.expert_weights, case.group, case.tau, case.score_scale, case.gate_up, case.down,
        case.gate_up_bias, case.down_bias, case.activation, ALPHA, LIMIT, case.transposed, case.interleaved,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "weight_dtype"), [*itertools.product(FLOATS, FLOATS)])
@pytest.mark.parametrize("transposed", [False, True])
def test_matches_the_definition_for_every_dtype(dtype: torch.dtype, weight_dtype: torch.dtype, transposed: bool) -> None:
    # more rows per expert than a tile holds, and sizes that are no multiple of any vector
    case = random_case(tokens=37, hidden=45, intermediate=39, experts=3, dtype=dtype, weight_dtype=weight_dtype,
                       transposed=transposed, biases=True)  # fmt: skip
    assert_close(run(case), case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("transposed", "interleaved"), [*itertools.product([False, True], [False, True])])
@pytest.mark.parametrize("biases", [False, True])
def test_matches_the_definition_for_every_layout(activation: str, transposed: bool, interleaved: bool, biases: bool) -> None:
    case = random_case(tokens=20, hidden=70, intermediate=101, activation=activation, transposed=transposed,
                       interleaved=interleaved, biases=biases)  # fmt: skip
    assert_close(run(case), case)


@given(
    tokens=st.integers(0, 40),
    hidden=st.integers(1, 50),
    intermediate=st.integers(1, 50),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 5),
    groups=st.integers(1, 3),
    activation=st.sampled_from(ACTIVATIONS),
    flags=st.tuples(*[st.booleans()] * 5),
    id_dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_matches_the_definition_on_random_shapes(flags: tuple[bool, ...], **sizes: object) -> None:
    transposed, interleaved, biases, per_expert, explicit_score = flags
    case = random_case(transposed=transposed, interleaved=interleaved, biases=biases, per_expert=per_expert,
                       explicit_score=explicit_score, **sizes)  # type: ignore[arg-type]  # fmt: skip
    kept = torch.full_like(case.tau, -1, dtype=torch.int64)
    assert_close(run(case, kept=kept), case)
    assert torch.equal(kept, kept_pairs(case))


@given(seed=st.integers(0, 2**31), top_k=st.integers(1, 8), dtype=st.sampled_from(FLOATS))
@settings(max_examples=60, deadline=None)
def test_decides_pairs_at_the_threshold_by_the_same_bits_as_torch(seed: int, top_k: int, dtype: torch.dtype) -> None:
    case = random_case(tokens=30, hidden=1, intermediate=1, top_k=top_k, groups=1, dtype=dtype, seed=seed)
    w = case.expert_weights.float()
    total = torch.zeros(30)
    for j in range(top_k):
        total = total + w[:, j]
    exactly = (case.score_scale * (w[7, 0] / total[7])).reshape(1)  # the threshold is the score of one pair
    for tau in (exactly, exactly.nextafter(torch.tensor(INF)), exactly.nextafter(torch.tensor(-INF))):
        kept = torch.zeros(1, dtype=torch.int64)
        run(case.but(tau=tau), kept=kept)
        assert int(kept) == int(keep_mask(case.but(tau=tau)).sum())


def test_zero_thresholds_keep_everything_and_infinite_ones_nothing() -> None:
    case, kept = random_case(), torch.zeros(2, dtype=torch.int64)
    everything = case.but(tau=torch.zeros(2))
    assert_close(run(everything, kept=kept), everything)
    assert int(kept.sum()) == case.expert_ids.numel()

    assert torch.equal(run(case.but(tau=torch.full((2,), INF)), kept=kept), torch.zeros_like(case.x))
    assert int(kept.sum()) == 0


def test_thresholds_act_on_their_own_group_only() -> None:
    case, kept = random_case(tokens=30), torch.zeros(2, dtype=torch.int64)
    case = case.but(tau=torch.tensor([0.0, INF]))
    out = run(case, kept=kept)
    assert torch.equal(out[case.group == 1], torch.zeros_like(out[case.group == 1]))
    assert_close(out, case)
    assert kept.tolist() == [3 * int((case.group == 0).sum()), 0]


def test_more_rows_than_one_round_of_scratch_memory_holds() -> None:
    case = random_case(tokens=900, hidden=20_000, intermediate=1, experts=2, top_k=2, tau=0.0)  # 1,677 of 1,800 rows fit
    kept = torch.zeros(2, dtype=torch.int64)
    out = run(case, kept=kept)
    assert int(kept.sum()) == 1800
    assert error(out, case) < 1e-5


def test_large_activations_do_not_overflow_the_sigmoid() -> None:
    for activation in ACTIVATIONS:
        case = random_case(activation=activation, tau=0.0).but(x=random_case().x * 200)
        assert_close(run(case), case)


@pytest.mark.parametrize("bad", [-1, 6, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_an_expert_id_out_of_range_is_named(bad: int, id_dtype: torch.dtype) -> None:
    case = random_case(id_dtype=id_dtype)
    case.expert_ids[4, 2] = bad
    with pytest.raises(KernelError, match=f"expert id `{bad}` of token 4, slot 2 is not in 0..5"):
        run(case)


def test_a_group_out_of_range_is_named() -> None:
    for bad in (-1, 2):
        case = random_case()
        case.group[3] = bad
        with pytest.raises(KernelError, match=f"group `{bad}` of token 3 is not in 0..1"):
            run(case)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_ids": torch.zeros(8, 3, dtype=torch.int64)}, "expert_ids has shape `[8, 3]`"),
        ({"expert_ids": torch.zeros(9, 3)}, "expert_ids is `float32`"),
        ({"expert_weights": torch.zeros(9, 3, dtype=torch.bfloat16)}, "expert_weights is `bfloat16`"),
        ({"group": torch.zeros(9, dtype=torch.int64)}, "group is `int64`"),
        ({"score_scale": torch.zeros(2, 5)}, "score_scale has shape `[2, 5]`"),
        ({"gate_up": torch.zeros(6, 24, 32)}, "gate_up has shape `[6, 24, 32]`"),
        ({"gate_up": torch.zeros(6, 24, 32).mT}, "gate_up is not contiguous"),
        ({"down": torch.zeros(6, 24, 16, dtype=torch.float16)}, "down is `float16`"),
        ({"down_bias": torch.zeros(6, 23)}, "down_bias has shape `[6, 23]`"),
        ({"activation": "relu"}, "activation is `relu`"),
        ({"x": torch.zeros(2, 3, 24)}, "x, expert_ids, tau have shapes `[2, 3, 24]`"),
        ({"x": torch.zeros(9, 24, dtype=torch.float64)}, "x is `float64`"),
    ],
)
def test_wrong_arguments_are_refused_with_their_value(changes: dict[str, object], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        run(random_case().but(**changes))
    assert message in str(caught.value)


def test_activations_may_be_strided_views() -> None:
    case = random_case()
    views = {name: getattr(case, name).mT.contiguous().mT for name in ("x", "expert_ids", "expert_weights")}
    assert not views["x"].is_contiguous()
    assert torch.equal(run(case.but(**views)), run(case))


def test_the_torch_operator_passes_opcheck_and_export() -> None:
    case = random_case(biases=True)
    operator = torch.ops.modes.skip_experts
    torch.library.opcheck(operator.default, operator_arguments(case))
    assert torch.equal(operator(*operator_arguments(case)), run(case))

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, group: Tensor) -> Tensor:
            return operator(x, expert_ids, expert_weights, group, *operator_arguments(case)[4:]) * 2

    inputs = (case.x, case.expert_ids, case.expert_weights, case.group)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Layer(), inputs, dynamic_shapes=({0: tokens},) * 4)
    longer = random_case(tokens=21)
    actual = program.module()(longer.x, longer.expert_ids, longer.expert_weights, longer.group)
    again = longer.but(
        **{name: getattr(case, name) for name in ("score_scale", "gate_up", "down", "gate_up_bias", "down_bias")}
    )
    assert torch.equal(actual, run(again) * 2)
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), run(case) * 2)


def test_the_library_is_found_and_says_what_it_is() -> None:
    assert kernels.available()
    path = kernels.library_path()
    assert path is not None
    assert path.name == "libmodes_cpu.so"
    assert kernels.version().count(".") == 2
