"""The threshold rule against its definition, and the policies that set its scales."""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from modes_cli.artifacts import Calibration
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadOption
from modes_cli.models.groups import GROUPS, SPECIAL, TEXT, VISION
from modes_cli.skipping.policy import (
    REGISTRY,
    Policy,
    Rule,
    importance_matrix,
    register,
    routing_probability,
    tau_vector,
)
from modes_cli.skipping.registry import from_result, policy, policy_names
from tests import examples
from tests.skipping import reference

taus = st.one_of(st.floats(0, 1, width=32), st.just(math.inf))


def random_pi(tokens: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        routing_probability(torch.randn(tokens, top_k, generator=generator).mul(2).softmax(-1))
        if tokens
        else torch.zeros(0, top_k)
    )


@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 40), top_k=st.integers(1, 8), text=taus, vision=taus)
def test_keeps_exactly_the_pairs_at_or_above_their_groups_threshold(
    seed: int, tokens: int, top_k: int, text: float, vision: float
) -> None:
    rule = reference.rule(3, text, vision, seed=seed)
    pi = random_pi(tokens, top_k, seed)
    group = torch.randint(0, len(GROUPS), (tokens,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    for layer in range(3):
        kept = rule.keep(pi, layer, group)
        assert kept.dtype == torch.bool
        assert torch.equal(kept, reference.keep(rule, pi, layer, group))
        assert bool(kept[group == SPECIAL].all())


@given(seed=st.integers(0, 2**31), slot=st.integers(0, 7))
def test_a_pair_on_the_threshold_is_kept_and_just_below_it_is_not(seed: int, slot: int) -> None:
    pi = random_pi(1, 8, seed)
    scale = reference.rule(1, 0, 0, seed=seed).score_scale
    on = scale[0, VISION] * pi[0, slot]
    group = torch.tensor([VISION])
    above = torch.nextafter(on, torch.tensor(math.inf))
    assert bool(Rule(scale, torch.stack([on, on, on * 0])).keep(pi, 0, group)[0, slot])
    assert not bool(Rule(scale, torch.stack([above, above, on * 0])).keep(pi, 0, group)[0, slot])


def test_zero_thresholds_keep_everything_and_infinite_ones_nothing() -> None:
    pi, group = torch.full((4, 4), 0.25), torch.tensor([TEXT, VISION, TEXT, VISION])
    for tau, kept in ((0.0, 16), (math.inf, 0)):
        rule = reference.rule(1, tau, tau)
        assert int(rule.keep(pi, 0, group).sum()) == kept
        assert rule.keeps_all == (kept == 16)


def test_with_tau_changes_nothing_else() -> None:
    rule = reference.rule(2, 0, 0, seed=1)
    other = rule.with_tau({"vision": 0.5})
    assert other.tau.tolist() == [0.0, 0.5, 0.0]
    assert other.score_scale is rule.score_scale
    assert rule.keeps_all
    assert not other.keeps_all


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 20),
    top_k=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_routing_probability_is_added_slot_by_slot_in_float32(seed: int, tokens: int, top_k: int, dtype: torch.dtype) -> None:
    weights = (torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(seed)) + 0.001).to(dtype)
    before = weights.clone()
    pi = routing_probability(weights)
    assert pi.dtype == torch.float32
    assert torch.equal(pi, reference.probability(weights))
    assert torch.equal(weights, before)


@given(seed=st.integers(0, 2**31), power=st.integers(-6, 6))
def test_a_factor_on_all_weights_cancels_out(seed: int, power: int) -> None:
    weights = torch.rand(8, 4, generator=torch.Generator().manual_seed(seed)) + 0.001
    assert torch.equal(routing_probability(weights * 2.0**power), routing_probability(weights))


def test_tau_vector_puts_thresholds_where_groups_are() -> None:
    assert tau_vector({"vision": 0.25}).tolist() == [0.0, 0.25, 0.0]
    assert tau_vector({"text": math.inf, "vision": 1, "special": 0.0}).tolist() == [math.inf, 1.0, 0.0]
    assert tau_vector({}).tolist() == [0.0] * len(GROUPS)


@pytest.mark.parametrize(
    ("tau", "named"),
    [
        ({"audio": 0.1}, "`audio`"),
        ({"special": 0.1}, "`special`"),
        ({"text": -0.1}, "`-0.1`"),
        ({"vision": math.nan}, "`nan`"),
        ({"x": 0, "y": 0}, "`x, y`"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(tau: dict[str, float], named: str) -> None:
    with pytest.raises(BadOption, match=named):
        tau_vector(tau)


@pytest.fixture
def calibration() -> Calibration:
    made: Calibration = examples.artifact("calibration")
    return made


# What each policy multiplies pi with, from the columns all, text and vision of the importance table.
SCALES = {
    ("modes",): lambda a, t, v: (a, a),
    ("gmlg",): lambda a, t, v: (a, a),
    ("dmt",): lambda a, t, v: (1.0, 1.0),
    ("threshold",): lambda a, t, v: (1.0, 1.0),
    ("tempered", ("power", 0.25)): lambda a, t, v: (a**0.25, a**0.25),
    ("tempered", ("power", 0.5), ("per_modality", 1.0)): lambda a, t, v: (t**0.5, v**0.5),
    ("tempered", ("power", 1.0)): lambda a, t, v: (a, a),
    ("tempered", ("power", 1.0), ("per_modality", 1.0)): lambda a, t, v: (t, v),
}


@pytest.mark.parametrize("named", SCALES, ids=str)
def test_score_scales_of_each_policy(named: tuple[str, *tuple[tuple[str, float], ...]], calibration: Calibration) -> None:
    name, *parameters = named
    made = policy(str(name), **dict(parameters)).rule(calibration, {"text": 0.5, "vision": 0.25})  # type: ignore[arg-type]
    assert made.tau.tolist() == [0.5, 0.25, 0.0]
    assert made.score_scale.shape == (calibration.moe_layers, len(GROUPS))
    assert made.score_scale.dtype == torch.float32
    for row, layer in zip(made.score_scale.tolist(), calibration.importance.values(), strict=True):
        assert row[:2] == pytest.approx(SCALES[named](layer.all, layer.text, layer.vision), rel=1e-6)


def test_every_policy_is_tested_and_listed() -> None:
    assert policy_names() == sorted({name for name, *_ in SCALES})
    assert [name for name in policy_names() if policy(name).one_threshold] == ["gmlg", "threshold"]


def test_a_layer_without_importance_has_score_zero_and_no_nan(calibration: Calibration) -> None:
    first, *others = calibration.importance
    layers = {first: calibration.importance[first].model_copy(update={"all": 0.0, "text": 0.0, "vision": 0.0})}
    changed = calibration.model_copy(
        update={"importance": {**layers, **{name: calibration.importance[name] for name in others}}}
    )
    for power in (0.25, 1.0):
        scale = policy("tempered", power=power, per_modality=1.0).rule(changed, {}).score_scale
        assert scale[0, :2].tolist() == [0.0, 0.0]
        assert not scale.isnan().any()


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadOption, match="no policy `magic`") as caught:
        policy("magic")
    assert all(name in str(caught.value.hint) for name in policy_names())


@pytest.mark.parametrize("parameters", [{"power": 1.5}, {"power": -0.1}, {"power": math.nan}, {"per_modality": 0.5}])
def test_parameters_out_of_range_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(BadOption, match="policy `tempered`"):
        policy("tempered", **parameters)


def test_a_registered_policy_is_found_by_name(monkeypatch: pytest.MonkeyPatch, calibration: Calibration) -> None:
    @register("doubled")
    class Doubled(Policy):
        def scale(self, importance: torch.Tensor) -> torch.Tensor:
            return 2 * importance[:, 1:]

    made = policy("doubled")
    assert made.name == "doubled"
    expected = 2 * importance_matrix(calibration)[:, 1:]
    assert torch.equal(made.rule(calibration, {}).score_scale[:, :2], expected.float())
    monkeypatch.delitem(REGISTRY, "doubled")


@pytest.mark.parametrize(("name", "parameters"), [("tempered", {"power": 0.5, "per_modality": 1.0}), ("gmlg", {})])
def test_a_search_result_gives_its_rule_back(name: str, parameters: dict[str, float], calibration: Calibration) -> None:
    result: SearchResult = (
        examples.artifact("thresholds")
        .results[0]
        .model_copy(update={"policy": name, "parameters": parameters, "tau": {"text": 0.125, "vision": 0.5}})
    )
    rule, expected = from_result(result, calibration), policy(name, **parameters).rule(calibration, result.tau)
    assert dataclasses.astuple(rule)[0].equal(expected.score_scale)
    assert rule.tau.tolist() == [0.125, 0.5, 0.0]
