"""Policies with a contribution of their own, against plain steps in Python, token by token."""

import functools
import itertools
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from modes_cli.models.groups import SPECIAL
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import mix, uniform
from modes_cli.skipping.policy import Rule
from modes_cli.skipping.registry import policy
from tests.skipping.measurements import EXPERTS, LAYERS, TOP_K, in_another_order, measured, pairs

FORMULAS = ("topk", "naee", "mcmoe", "diep", "topp", "random", "predicted", "salient")
UNIT = 2.0**-24
seeds = st.integers(0, 2**31)
layers = st.integers(0, LAYERS - 1)


@functools.cache
def rule_of(name: str, **parameters: float) -> Rule:
    return policy(name, **parameters).rule(measured(), {})


def score(rule: Rule, many: Pairs) -> Tensor:
    return rule.score(many)


def ordered(pi: list[float], experts: list[int]) -> list[int]:
    """Slots by falling pi; among equal ones, by rising expert."""
    return sorted(range(len(pi)), key=lambda slot: (-pi[slot], experts[slot]))


def by_token(many: Pairs) -> list[tuple[list[float], list[int], int]]:
    assert many.experts is not None
    return list(zip(many.pi.tolist(), many.experts.tolist(), many.group.tolist(), strict=True))


def close(found: Tensor, expected: list[list[float]], atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected).reshape(found.shape), rtol=2e-5, atol=atol)


# -- each policy against its definition -----------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=seeds, kept=st.floats(0, TOP_K), ties=st.booleans())
def test_topk_keeps_the_largest_and_one_more_of_some_tokens(seed: int, kept: float, ties: bool) -> None:
    many = pairs(seed, 30, ties=ties)
    keep = score(rule_of("topk"), many) >= 1 - kept / TOP_K
    for row, (pi, experts, _) in zip(keep.tolist(), by_token(many), strict=True):
        count = sum(row)
        assert count in (math.floor(kept - 1e-4), math.floor(kept), math.floor(kept) + 1, math.floor(kept + 1e-4) + 1)
        assert [slot for slot in ordered(pi, experts)[:count] if not row[slot]] == []


@pytest.mark.parametrize("kept", [0.5, 1.0, 1.25, 2.75, 4.0])
def test_topk_keeps_as_many_as_asked_on_average(kept: float) -> None:
    keep = score(rule_of("topk"), pairs(1, 20_000)) >= 1 - kept / TOP_K
    assert float(keep.float().sum(1).mean()) == pytest.approx(kept, abs=0.015)


@settings(max_examples=20)
@given(seed=seeds, layer=layers, ties=st.booleans())
def test_naee_is_the_ratio_to_the_first_over_the_median(seed: int, layer: int, ties: bool) -> None:
    many, beta = pairs(seed, layer=layer, ties=ties), measured().tensors["slot_ratio"][layer].tolist()
    expected = []
    for pi, experts, _ in by_token(many):
        row = [0.0] * TOP_K
        for place, slot in enumerate(ordered(pi, experts)):
            row[slot] = (1 + pi[slot]) / min(beta) if place == 0 else pi[slot] / (beta[place] * max(pi))
        expected.append(row)
    close(score(rule_of("naee"), many), expected)


@settings(max_examples=20)
@given(seed=seeds, layer=layers)
def test_naee_at_one_is_the_papers_rule(seed: int, layer: int) -> None:
    many, beta = pairs(seed, layer=layer), measured().tensors["slot_ratio"][layer].tolist()
    keep = score(rule_of("naee"), many) >= 1
    for row, (pi, experts, _) in zip(keep.tolist(), by_token(many), strict=True):
        for place, slot in enumerate(ordered(pi, experts)):
            bound = beta[place] * max(pi)
            assert row[slot] == (place == 0 or pi[slot] >= bound) or pi[slot] == pytest.approx(bound, rel=1e-5)


@settings(max_examples=20)
@given(seed=seeds, layer=layers, protected=st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_mcmoe_keeps_all_of_protected_tokens_and_is_naee_elsewhere(seed: int, layer: int, protected: float) -> None:
    many = pairs(seed, layer=layer)
    assert many.standing is not None
    rule, naee = rule_of("mcmoe", protected=protected), rule_of("naee")
    found, chosen = score(rule, many), many.standing < protected
    assert torch.equal(rule.score_scale, naee.score_scale)
    assert torch.equal(found[~chosen], score(naee, many)[~chosen])
    assert bool((found[chosen] >= score(naee, many).max()).all())


@settings(max_examples=20)
@given(seed=seeds, layer=layers, ties=st.booleans())
def test_diep_weakens_what_resembles_the_first_expert(seed: int, layer: int, ties: bool) -> None:
    tensors = measured().tensors
    many, beta = pairs(seed, layer=layer, ties=ties), tensors["slot_ratio"][layer].tolist()
    alike = ((1 + tensors["expert_similarity"][layer].double()) / 2).clamp(0.05, 1.0)
    expected = []
    for pi, experts, _ in by_token(many):
        order, row = ordered(pi, experts), [0.0] * TOP_K
        for place, slot in enumerate(order):
            c = float(alike[experts[order[0]], experts[slot]])
            ratio = pi[slot] / (beta[place] * c * max(pi))
            row[slot] = (1 + pi[slot]) / (min(beta) * float(alike.min())) if place == 0 else ratio
        expected.append(row)
    close(score(rule_of("diep"), many), expected, atol=1e-5)  # 1 + a cosine close to -1 cancels


@settings(max_examples=20)
@given(seed=seeds, ties=st.booleans())
def test_topp_is_one_less_the_mass_before(seed: int, ties: bool) -> None:
    many = pairs(seed, ties=ties)
    expected = []
    for pi, experts, _ in by_token(many):
        row, mass = [0.0] * TOP_K, 0.0
        for place, slot in enumerate(ordered(pi, experts)):
            row[slot] = 1 + pi[slot] if place == 0 else 1 - mass
            mass += pi[slot]
        expected.append(row)
    close(score(rule_of("topp"), many), expected)


@settings(max_examples=20)
@given(seed=seeds, p=st.floats(0.01, 0.999))
def test_topp_keeps_the_smallest_set_that_reaches_p(seed: int, p: float) -> None:
    many = pairs(seed)
    keep = score(rule_of("topp"), many) >= 1 - p
    for row, (pi, experts, _) in zip(keep.tolist(), by_token(many), strict=True):
        order = ordered(pi, experts)
        sums = list(itertools.accumulate(pi[slot] for slot in order))
        if min(abs(s - p) for s in sums) > 1e-5:
            smallest = next((i + 1 for i, s in enumerate(sums) if s >= p), TOP_K)
            assert sorted(order[:smallest]) == [slot for slot, kept in enumerate(row) if kept]


def test_random_skips_the_share_asked_for_wherever_it_is_looked_at() -> None:
    many = pairs(3, 20_000)
    found = score(rule_of("random"), many)
    assert many.experts is not None
    rank = many.pi.argsort(1, descending=True).argsort(1)
    for share in (0.1, 0.5, 0.9):
        skipped = (found < share).float()
        assert float(skipped.mean()) == pytest.approx(share, abs=0.01)
        for slots in (rank == 0, rank == TOP_K - 1, many.experts == 5, many.group[:, None].expand(-1, TOP_K) == 1):
            assert float(skipped[slots].mean()) == pytest.approx(share, abs=0.025)
    other = score(rule_of("random", seed=1), many)
    assert abs(float(torch.corrcoef(torch.stack([found.flatten(), other.flatten()]))[0, 1])) < 0.02


@settings(max_examples=20)
@given(seed=seeds, layer=layers)
def test_predicted_is_pi_times_the_predicted_norm(seed: int, layer: int) -> None:
    t: dict[str, Any] = {name: tensor.double()[layer].tolist() for name, tensor in measured().tensors.items()}
    many = pairs(seed, 6, layer=layer)
    assert many.hidden is not None
    scale = policy("grouped").rule(measured(), {}).score_scale.double()
    largest = math.exp(float(measured().tensors["norm_range"][:, 1].max()))
    expected = []
    for (pi, experts, group), hidden in zip(by_token(many), many.hidden.tolist(), strict=True):
        logits = [math.fsum(w * h for w, h in zip(t["router"][e], hidden, strict=True)) for e in range(EXPERTS)]
        logits = [value + bias for value, bias in zip(logits, t["router_bias"], strict=True)]
        mass = math.fsum(math.exp(logits[e]) for e in experts) / math.fsum(map(math.exp, logits))
        known, row = [*logits, math.log(mass), 1.0], []
        for p, e in zip(pi, experts, strict=True):
            norm = math.fsum(c * f for c, f in zip(t["norm_predictor"][e], known, strict=True))
            low, high = t["norm_range"]
            row.append(float(scale[layer, group]) * p * math.exp(min(max(norm, low), high)) / largest)
        expected.append(row)
    close(score(rule_of("predicted"), many), expected)


@settings(max_examples=20)
@given(seed=seeds, layer=layers, power=st.sampled_from([0.0, 0.7, 1.0]))
def test_salient_is_pi_to_one_and_a_half_times_predicted_norm_and_saliency(seed: int, layer: int, power: float) -> None:
    tensors = measured().tensors
    many = pairs(seed, 6, layer=layer)
    assert many.hidden is not None
    weights, ranges = (tensors[name].double() for name in ("saliency", "saliency_range"))
    alive = ranges[:, :, 2] > 0
    most = float(ranges[:, :, 1][alive].max())
    norms = score(rule_of("predicted", power=0.0), many)
    expected = []
    for (pi, _, group), hidden, row in zip(by_token(many), many.hidden.tolist(), norms.tolist(), strict=True):
        own = weights[layer, group].tolist()
        u = math.fsum([*(w * h for w, h in zip(own[:-1], hidden, strict=True)), own[-1]])
        low, high, _ = ranges[layer, group].tolist()
        u = math.exp(power * (min(max(u, low), high) - most)) if alive[layer, group] else 0.0
        # Special tokens are kept whatever their score is.
        expected.append([0.0 if group == SPECIAL else s * math.sqrt(p) * u for p, s in zip(pi, row, strict=True)])
    found = score(rule_of("salient", power=power), many)
    close(found * (many.group != SPECIAL)[:, None], expected)


# -- what all have in common --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=20)
@given(seed=seeds, layer=layers, ties=st.booleans())
def test_contributions_lie_within_the_histogram(name: str, seed: int, layer: int, ties: bool) -> None:
    contribution = rule_of(name).contribution
    assert contribution is not None
    found = contribution(pairs(seed, layer=layer, ties=ties))
    assert found.dtype == torch.float32
    assert bool((found >= UNIT).all())
    assert bool((found <= 1).all())


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=20)
@given(seed=seeds, ties=st.booleans())
def test_the_order_of_slots_does_not_matter(name: str, seed: int, ties: bool) -> None:
    many, rule = pairs(seed, ties=ties), rule_of(name)
    slots = torch.rand(many.pi.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    other = score(rule, in_another_order(many, slots))
    if name in ("predicted", "salient"):  # sums of exponentials in another order: the last bits differ
        torch.testing.assert_close(other, score(rule, many).gather(1, slots), rtol=1e-5, atol=0)
    else:
        assert torch.equal(other, score(rule, many).gather(1, slots))


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=20)
@given(seed=seeds, low=st.floats(0, 2), more=st.floats(0, 2))
def test_a_larger_threshold_keeps_less(name: str, seed: int, low: float, more: float) -> None:
    many, rule = pairs(seed), rule_of(name)
    kept = [
        rule.with_tau({"text": tau, "vision": tau, "audio": tau}).keep(
            many.pi, many.layer, many.group, many.experts, many.hidden
        )
        if name != "mcmoe"
        else rule.score(many) >= tau
        for tau in (low, low + more)
    ]
    assert not bool((kept[1] & ~kept[0]).any())


@pytest.mark.parametrize("name", FORMULAS)
def test_every_share_can_be_skipped(name: str) -> None:
    """No threshold at which many pairs go at once."""
    found = score(rule_of(name, **({"protected": 0.0} if name == "mcmoe" else {})), pairs(2, 5000)).flatten()
    _, counts = found.unique(return_counts=True)
    assert int(counts.max()) <= 0.002 * found.numel()


@pytest.mark.parametrize("name", FORMULAS)
def test_the_same_again_one_by_one_and_for_no_token(name: str) -> None:
    many, rule = pairs(4), rule_of(name)
    assert many.experts is not None
    assert many.hidden is not None
    assert many.standing is not None
    found = score(rule, many)
    assert torch.equal(found, score(policy(name).rule(measured(), {}), many))
    for t in range(len(found)):
        part = (value[t : t + 1] for value in (many.pi, many.group, many.experts, many.hidden, many.standing))
        torch.testing.assert_close(score(rule, Pairs(0, *part)), found[t : t + 1], rtol=1e-5, atol=0)
    assert score(rule, pairs(4, 0)).shape == (0, TOP_K)


def test_keys_tell_contributions_apart() -> None:
    keys = [contribution.key for name in FORMULAS if (contribution := rule_of(name).contribution) is not None]
    assert len(set(keys)) == len(FORMULAS)
    again = [policy(name).rule(measured(), {}).contribution for name in FORMULAS]
    assert keys == [contribution.key for contribution in again if contribution is not None]
    other = policy("naee").rule(measured(slot_ratio=torch.full((LAYERS, TOP_K), 0.5)), {}).contribution
    assert other is not None
    assert other.key not in keys
    seeded = rule_of("random", seed=1).contribution
    assert seeded is not None
    assert seeded.key not in keys


def test_a_formula_is_made_again_from_its_tensors() -> None:
    many = pairs(5)
    for name in FORMULAS:
        kind, made = policy(name).formula, rule_of(name).contribution
        assert kind is not None
        assert isinstance(made, kind)
        again = kind(made.tensors, made.parameters)
        assert again.key == made.key
        assert torch.equal(again(many), made(many))
        assert all(tensor.shape[0] == LAYERS and tensor.dtype == torch.float32 for tensor in made.tensors.values())


@settings(max_examples=20)
@given(seed=seeds)
def test_hashes_are_uniform_and_do_not_collide_in_rows(seed: int) -> None:
    u = uniform(mix(seed + torch.arange(4096)))
    assert bool(((u >= 0) & (u < 1)).all())
    counts = torch.histc(u, 16, 0, 1)
    assert float(((counts - 256) ** 2 / 256).sum()) < 60  # chi squared, 15 degrees of freedom: 60 is one in a million


@pytest.mark.parametrize("name", [name for name in FORMULAS if policy(name).exportable])
def test_exportable_formulas_look_at_no_value(name: str) -> None:
    """With tensors that have shapes and no values, as when a graph is traced: whatever reads one raises."""
    formula: Any = rule_of(name).contribution
    many = pairs(6, 9, 1)
    layer = {key: tensor[1] for key, tensor in formula.tensors.items()}
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        own = {key: mode.from_tensor(tensor) for key, tensor in layer.items()}
        fields = (many.pi, many.group, many.experts, many.hidden)
        found = formula.of(own, Pairs(1, *(mode.from_tensor(field) for field in fields if field is not None)))
    assert (found.shape, found.dtype) == (many.pi.shape, torch.float32)
