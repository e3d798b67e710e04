"""Predicted skip ratios against counting pairs one by one."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from modes_cli.calibration.scores import bin_of
from modes_cli.models.groups import DECODE, GROUPS, SPECIAL, TEXT, VISION
from modes_cli.search.staircase import Staircase
from modes_cli.skipping.policy import Rule, tau_vector
from tests.search.fakes import TOKENS, counts_of, random_scale, scores

seeds = st.integers(0, 2**31)
shares = st.floats(0, 1)
some = st.sampled_from([(TEXT,), (VISION,), (TEXT, DECODE)])
QUICK = settings(max_examples=40)


def staircase(seed: int, tokens: tuple[int, ...] = TOKENS) -> Staircase:
    return Staircase(counts_of(scores(seed, tokens=tokens)), random_scale(seed))


def previous(tau: float) -> float:
    return float(np.nextafter(np.float32(tau), np.float32(0)))


@QUICK
@given(seed=seeds, text=st.floats(0, 1.25, width=32), vision=st.floats(0, 1.25, width=32))
def test_the_ratio_is_that_of_the_rule_but_for_the_bins_on_the_threshold(seed: int, text: float, vision: float) -> None:
    pi, scale = scores(seed), random_scale(seed)
    made = Staircase(counts_of(pi), scale)
    rule = Rule(scale, tau_vector({"text": text, "vision": vision}))
    skipped = total = uncertain = 0
    for layer, groups in enumerate(pi):
        for group, values in enumerate(groups):
            skipped += int((~rule.keep(values, layer, torch.full((len(values),), group))).sum())
            total += values.numel()
            on = bin_of((rule.tau[group] / scale[layer, group]).reshape(1))
            uncertain += int(((bin_of(values) - on).abs() <= 1).sum()) if group != SPECIAL else 0
    assert made.total == total
    assert abs(made.ratio(text, vision) - skipped / total) <= uncertain / total + 1e-12


@QUICK
@given(
    seed=seeds,
    group=st.sampled_from([(TEXT,), (VISION,), (TEXT, DECODE)]),
    taus=st.lists(st.floats(0, 2, width=32), min_size=2, max_size=8),
)
def test_a_higher_threshold_never_skips_less(seed: int, group: tuple[int, ...], taus: list[float]) -> None:
    made = staircase(seed)
    skipped = [made.skipped(group, tau) for tau in sorted(taus)]
    assert skipped == sorted(skipped)
    assert made.skipped(group, 0.0) == 0.0


@QUICK
@given(seed=seeds, group=some, share=shares)
def test_tau_for_is_the_smallest_threshold_that_skips_a_share(seed: int, group: tuple[int, ...], share: float) -> None:
    made = staircase(seed)
    tau = made.tau_for(group, share)
    assert tau == float(np.float32(tau))
    assert made.skipped(group, tau) >= share * made.pairs(group) - 1e-9
    if 0 < share < 1:
        assert made.skipped(group, previous(tau)) < share * made.pairs(group)
    assert (tau == 0.0) == (share == 0.0)


@QUICK
@given(seed=seeds, target=shares, position=shares)
def test_pairs_on_the_edge_reach_their_target_and_no_more(seed: int, target: float, position: float) -> None:
    made = staircase(seed)
    target *= made.largest
    low, high = made.text_range(target)
    assert 0 <= low <= high <= 1
    text, vision = made.pair_for(target, low + position * (high - low))
    assert made.ratio(text, vision) >= target - 1e-9
    if vision > 0:
        assert made.ratio(text, previous(vision)) <= target + 1e-6  # a step of float32


@QUICK
@given(seed=seeds, target=shares)
def test_the_single_threshold_is_the_smallest_that_reaches_its_target(seed: int, target: float) -> None:
    made = staircase(seed)
    target *= made.largest
    tau = made.single_for(target)
    assert made.ratio(tau, tau) >= target - 1e-12
    assert made.ratio(previous(tau), previous(tau)) < target or target == 0 or previous(tau) == 0


@QUICK
@given(seed=seeds)
def test_the_largest_ratio_leaves_special_tokens_alone(seed: int) -> None:
    pi, scale = scores(seed), random_scale(seed)
    made = Staircase(counts_of(pi), scale)
    text, vision = made.top(made.text), made.top(made.vision)
    sizes = [sum(groups[group].numel() for groups in pi) for group in range(len(GROUPS))]
    assert made.largest == (sizes[TEXT] + sizes[VISION] + sizes[DECODE]) / sum(sizes)
    assert made.ratio(text, vision) == made.largest
    rule = Rule(scale, tau_vector({"text": text, "vision": vision}))
    for layer, groups in enumerate(pi):
        for group in (TEXT, VISION, DECODE):
            assert not rule.keep(groups[group], layer, torch.full((len(groups[group]),), group)).any()


def test_scores_of_one_can_all_be_skipped() -> None:
    """With one expert per token every pi is exactly 1, the end of the last bin."""
    made = Staircase(counts_of([[torch.ones(n, 1) for n in (5, 7, 0, 0, 2)] for _ in range(2)]), random_scale(1, layers=2))
    assert made.ratio(made.top((TEXT,)), made.top((VISION,))) == made.largest == 12 / 14
    assert made.skipped((VISION,), made.tau_for((VISION,), 0.99)) >= 0.99 * made.pairs((VISION,))


@pytest.mark.parametrize("tokens", [(60, 0, 15, 0, 10), (0, 120, 0, 0, 10)])
def test_a_group_without_tokens(tokens: tuple[int, ...]) -> None:
    made = staircase(3, tokens)
    absent, present = (made.vision, made.text) if tokens[1] == 0 else (made.text, made.vision)
    assert made.tau_for(absent, 0.5) == 0.0
    assert made.skipped(absent, 1.0) == 0.0
    for target in (0.2, 0.8):
        low, high = made.text_range(target)
        pair = made.pair_for(target, high if absent == made.vision else low)
        assert made.ratio(*pair) == pytest.approx(target, abs=1e-6)
        assert pair[0 if absent == made.text else 1] == 0.0
    assert made.tau_for(present, 0.5) > 0


def test_a_layer_without_importance_is_skipped_by_any_threshold() -> None:
    pi, scale = scores(5), random_scale(5)
    scale[1, TEXT] = 0.0
    made = Staircase(counts_of(pi), scale)
    assert made.skipped((TEXT,), 1e-30) == pi[1][TEXT].numel()


@QUICK
@given(seed=seeds, target=shares, position=shares, decode=shares)
def test_decode_with_a_threshold_of_its_own(seed: int, target: float, position: float, decode: float) -> None:
    counts, scale = counts_of(scores(seed)), random_scale(seed)
    together = Staircase(counts, scale)
    tau = together.tau_for((DECODE,), decode)
    apart = Staircase(counts, scale, tau)
    assert apart.skipped((DECODE,), tau) >= decode * apart.pairs((DECODE,)) - 1e-9
    most = apart.pairs((DECODE,)) - apart.skipped((DECODE,), tau)
    assert apart.largest == pytest.approx(together.largest - most / apart.total, abs=1e-9)
    wanted = target * apart.largest
    low, high = apart.text_range(wanted)
    assert 0 <= low <= 1
    assert 0 <= high <= 1
    text, vision = apart.pair_for(wanted, low + position * (high - low))
    assert apart.ratio(text, vision) >= wanted - 1e-9
    skipped = sum(apart.skipped((group,), value) for group, value in ((TEXT, text), (VISION, vision), (DECODE, tau)))
    assert apart.ratio(text, vision) == pytest.approx(skipped / apart.total, abs=1e-9)
