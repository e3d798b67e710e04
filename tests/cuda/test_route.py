"""Which pairs are kept, in which order, and what becomes of tokens whose routing is broken."""

import os
import subprocess
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.cuda.calling import SEEDS, Device, run
from tests.kernels.reference import (
    Case,
    assert_close,
    assert_close_to_float64,
    keep_mask,
    kept_pairs,
    random_case,
    skip_experts,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")
FEW, MANY = 700, 5000  # pairs: one block does the first alone, the second takes several


def by_token(case: Case) -> Case:
    """The same layer with a group for each token, so that kept says what each token keeps."""
    group = case.group.long()
    return case.but(group=torch.arange(len(group), dtype=torch.int32), tau=case.tau[group], score_scale=case.score_scale[group])


def check(device: Device, case: Case) -> None:
    kept = torch.zeros_like(case.tau, dtype=torch.int64)
    assert_close_to_float64(run(device, case, path="plain", kept=kept), case)
    assert torch.equal(kept, kept_pairs(case))


def test_routing_equals_the_cpu_operator(emulated_library: Path) -> None:
    """kernels/cpu/routing.cpp against the emulated kernels, array by array, on random and adversarial inputs."""
    program = emulated_library.parent / "route_check"
    if not program.is_file():
        pytest.skip(f"no {program.name} beside the library under test")
    for seed in SEEDS[:2]:
        environment = os.environ | {"MODES_EMULATED_SEED": str(seed)}
        done = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        assert done.stdout.endswith("cases agree\n")


@pytest.mark.parametrize("pairs", [FEW, MANY])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_every_token_keeps_what_the_definition_keeps(device: Device, pairs: int, id_dtype: torch.dtype) -> None:
    for per_expert, explicit_score, top_k in ((False, False, 3), (True, False, 8), (False, True, 1)):
        case = random_case(tokens=pairs // top_k, hidden=1, intermediate=1, top_k=top_k, experts=11, per_expert=per_expert,
                           explicit_score=explicit_score, id_dtype=id_dtype)  # fmt: skip
        check(device, by_token(case))
        check(device, case)


@given(seed=st.integers(0, 2**31), top_k=st.integers(1, 8), dtype=st.sampled_from(FLOATS))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pairs_at_the_threshold_are_decided_as_torch_does(device: Device, seed: int, top_k: int, dtype: torch.dtype) -> None:
    case = random_case(tokens=30, hidden=1, intermediate=1, top_k=top_k, groups=1, dtype=dtype, seed=seed)
    w = case.expert_weights.float()
    total = torch.zeros(30)
    for j in range(top_k):
        total = total + w[:, j]
    exactly = (case.score_scale * (w[7, 0] / total[7])).reshape(1)  # the threshold is the score of one pair
    for tau in (exactly, exactly.nextafter(torch.tensor(INF)), exactly.nextafter(torch.tensor(-INF))):
        kept = torch.zeros(1, dtype=torch.int64)
        run(device, case.but(tau=tau), kept=kept)
        assert int(kept) == int(keep_mask(case.but(tau=tau)).sum())


@pytest.mark.parametrize("pairs", [FEW, MANY])
@pytest.mark.parametrize("experts", [1, 2, 257, 1024])
def test_any_number_of_experts(device: Device, pairs: int, experts: int) -> None:
    check(device, random_case(tokens=pairs // 4, hidden=2, intermediate=1, top_k=4, experts=experts))


@pytest.mark.parametrize("pairs", [FEW, MANY])
def test_one_expert_has_all_rows(device: Device, pairs: int) -> None:
    case = random_case(tokens=pairs // 2, hidden=3, intermediate=2, top_k=2, tau=0.0)
    check(device, case.but(expert_ids=torch.full_like(case.expert_ids, 4)))


@pytest.mark.parametrize("pairs", [FEW, MANY])
@pytest.mark.parametrize("groups", [1, 2, 64, 65, 3000])
def test_kept_counts_of_any_number_of_groups(device: Device, pairs: int, groups: int) -> None:
    check(device, random_case(tokens=pairs // 3, hidden=1, intermediate=1, groups=groups))


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_zero_thresholds_keep_everything_and_infinite_ones_nothing(device: Device, tokens: int) -> None:
    case, kept = random_case(tokens=tokens), torch.zeros(2, dtype=torch.int64)
    everything = case.but(tau=torch.zeros(2))
    assert_close(run(device, everything, kept=kept), everything)
    assert int(kept.sum()) == case.expert_ids.numel()

    assert torch.equal(run(device, case.but(tau=torch.full((2,), INF)), kept=kept), torch.zeros_like(case.x))
    assert kept.tolist() == [0, 0]


def test_thresholds_act_on_their_own_group_only(device: Device) -> None:
    case, kept = random_case(tokens=30), torch.zeros(2, dtype=torch.int64)
    case = case.but(tau=torch.tensor([0.0, INF]))
    out = run(device, case, kept=kept)
    assert torch.equal(out[case.group == 1], torch.zeros_like(out[case.group == 1]))
    assert_close(out, case)
    assert kept.tolist() == [3 * int((case.group == 0).sum()), 0]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_broken_weight_shows_in_its_token_only(device: Device, bad: float) -> None:
    case = random_case()
    case.expert_weights[4, 1] = bad
    out = run(device, case)
    others = torch.arange(9) != 4
    assert torch.equal(out[others], run(device, random_case())[others])
    assert out[4].isnan().all() == skip_experts(case)[4].isnan().all()
    assert_close(out, case)


@pytest.mark.parametrize("bad", [-1, 6, 2**31 - 1, -(2**31), 2**40, -(2**40), 2**32 + 1])
@pytest.mark.parametrize("tokens", [9, 1000])
def test_an_expert_id_out_of_range_makes_its_token_nan(device: Device, bad: int, tokens: int) -> None:
    case = random_case(tokens=tokens, tau=0.0, intermediate=1)
    whole = run(device, case)
    ids = case.expert_ids.clone()
    ids[[4, tokens - 1], 2] = bad
    kept = torch.zeros(2, dtype=torch.int64)
    out = run(device, case.but(expert_ids=ids), kept=kept)
    good = (torch.arange(tokens) != 4) & (torch.arange(tokens) != tokens - 1)
    assert torch.equal(out[good], whole[good])
    assert out[~good].isnan().all()
    assert int(kept.sum()) == 3 * tokens - 2
    # also where every pair would be skipped
    assert run(device, case.but(expert_ids=ids, tau=torch.full((2,), INF)))[~good].isnan().all()


@pytest.mark.parametrize("bad", [-1, 2, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("tokens", [9, 1000])
def test_a_group_out_of_range_makes_its_token_nan(device: Device, bad: int, tokens: int) -> None:
    case = random_case(tokens=tokens, tau=0.0, intermediate=1)
    whole = run(device, case)
    group = case.group.clone()
    group[3] = bad
    kept = torch.zeros(2, dtype=torch.int64)
    out = run(device, case.but(group=group), kept=kept)
    good = torch.arange(tokens) != 3
    assert torch.equal(out[good], whole[good])
    assert out[3].isnan().all()
    assert int(kept.sum()) == 3 * (tokens - 1)


@pytest.mark.parametrize("pairs", [FEW, MANY])
def test_every_schedule_routes_alike(device: Device, pairs: int) -> None:
    case = random_case(tokens=pairs // 8, hidden=2, intermediate=1, top_k=8, experts=7, groups=3)
    first, kept = run(device, case, path="plain"), torch.zeros(3, dtype=torch.int64)
    for seed in SEEDS:
        assert torch.equal(run(device, case, path="plain", seed=seed, kept=kept), first)
        assert torch.equal(kept, kept_pairs(case))
