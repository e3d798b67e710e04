"""The CPU operator against its plain definition, on random layers and at its edges."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from modes_cli.errors import KernelError
from modes_cli.runtime import kernels
from tests.kernels.reference import ACTIVATIONS, ALPHA, LIMIT, Case, assert_close, keep_mask, kept_pairs, random_case

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")
ROOT = Path(__file__).parents[2]


def run(case: Case, *, kept: Tensor | None = None, threads: int | None = None) -> Tensor:
    return kernels.skip_experts(
        case.x, case.expert_ids, case.expert_weights, case.group, case.tau, case.score_scale, case.gate_up, case.down,
        case.gate_up_bias, case.down_bias, case.activation, ALPHA, LIMIT, case.transposed, case.interleaved,
        score=case.score, kept=kept, threads=threads,
    )  # fmt: skip


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
    out = run(case.but(tau=torch.tensor([0.0, INF])), kept=kept)
    assert torch.equal(out[case.group == 1], torch.zeros_like(out[case.group == 1]))
    assert torch.equal(out[case.group == 0], run(case.but(tau=torch.zeros(2)))[case.group == 0])
    assert kept.tolist() == [3 * int((case.group == 0).sum()), 0]


def test_no_tokens() -> None:
    kept = torch.ones(2, dtype=torch.int64)
    assert run(random_case(tokens=0), kept=kept).shape == (0, 24)
    assert kept.tolist() == [0, 0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_same_bits_for_any_number_of_threads(transposed: bool, weight_dtype: torch.dtype) -> None:
    case = random_case(tokens=120, hidden=200, intermediate=210, experts=7, transposed=transposed, weight_dtype=weight_dtype)
    alone = run(case, threads=1)
    for threads in (2, 3, 5):
        assert torch.equal(run(case, threads=threads), alone)
    assert_close(alone, case)


def test_same_bits_for_a_token_alone_and_among_others() -> None:
    case = random_case(tokens=40, hidden=65, intermediate=50)
    together = run(case)
    for t in (0, 17, 39):
        one = {name: getattr(case, name)[t : t + 1] for name in ("x", "expert_ids", "expert_weights", "group")}
        assert torch.equal(run(case.but(**one))[0], together[t])


def test_calls_from_many_threads_at_once() -> None:
    cases = [random_case(tokens=60, hidden=128, intermediate=128, seed=seed) for seed in range(8)]
    alone = [run(case, threads=1) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for out, expected in zip(pool.map(lambda case: run(case, threads=3), cases), alone, strict=True):
                assert torch.equal(out, expected)


def test_works_in_a_forked_child() -> None:
    code = (
        "import os; from tests.kernels.reference import random_case; from tests.kernels.test_skip_experts import run\n"
        "case = random_case(tokens=60, hidden=128, intermediate=128); before = run(case, threads=3)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if run(case, threads=3).equal(before) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets_match_the_definition(isa: str) -> None:
    if kernels.isa() == "baseline":
        pytest.skip("this CPU has only one")
    code = (
        "import itertools, torch; from modes_cli.runtime import kernels\n"
        "from tests.kernels.reference import assert_close, random_case; from tests.kernels.test_skip_experts import run\n"
        f"assert kernels.isa() == '{isa}'\n"
        "for dtype, weight_dtype in itertools.product((torch.float32, torch.float16, torch.bfloat16), repeat=2):\n"
        "    for transposed, interleaved in itertools.product((False, True), repeat=2):\n"
        "        case = random_case(tokens=37, hidden=45, intermediate=39, experts=3, dtype=dtype, biases=True,\n"
        "            weight_dtype=weight_dtype, transposed=transposed, interleaved=interleaved, activation='swiglu_oai')\n"
        "        assert_close(run(case), case)"
    )
    environment = {**os.environ, "MODES_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=True, cwd=ROOT)


def test_more_rows_than_one_round_of_scratch_memory_holds() -> None:
    case = random_case(tokens=900, hidden=20_000, intermediate=1, experts=2, top_k=2, tau=0.0)  # 1,677 of 1,800 rows fit
    kept = torch.zeros(2, dtype=torch.int64)
    out = run(case, kept=kept)
    assert int(kept.sum()) == 1800
    for t in (0, 837, 838, 839, 840, 899):  # the last tokens of the first round, and those after
        one = {name: getattr(case, name)[t : t + 1] for name in ("x", "expert_ids", "expert_weights", "group")}
        assert torch.equal(out[t], run(case.but(**one))[0])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_broken_token_stays_alone(value: float) -> None:
    case = random_case(tokens=40, hidden=30, experts=3).but(tau=torch.zeros(2))
    sound = run(case)
    x = case.x.clone()
    x[11, 5] = value
    out = run(case.but(x=x))
    assert not out[11].isfinite().all()
    others = torch.arange(40) != 11
    assert torch.equal(out[others], sound[others])


def test_a_token_with_nan_weights_is_nan_and_stays_alone() -> None:
    case = random_case(tokens=12)
    w = case.expert_weights.clone()
    w[4] = NAN
    out = run(case.but(expert_weights=w))
    assert out[4].isnan().all()
    others = torch.arange(12) != 4
    assert torch.equal(out[others], run(case)[others])


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
        ({"x": torch.zeros(2, 3, 24)}, "x, expert_ids, tau, down have shapes `[2, 3, 24]`"),
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
    assert kernels.isa() in {"avx512", "avx2", "baseline"}
