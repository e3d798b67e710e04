"""The threshold rule against its definition, and the policies that set its scales."""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadArtifact, BadOption
from modes_cli.models.groups import DECODE, GROUPS, SPECIAL, TEXT, VISION
from modes_cli.skipping.policy import REGISTRY, Policy, Rule, register, routing_probability, tau_vector
from modes_cli.skipping.registry import from_result, policy, policy_names
from tests.skipping import reference
from tests.skipping.measurements import EXPERTS, LAYERS, TOKENS, measured

taus = st.one_of(st.floats(0, 1, width=32), st.just(math.inf))


def random_pi(tokens: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        routing_probability(torch.randn(tokens, top_k, generator=generator).mul(2).softmax(-1))
        if tokens
        else torch.zeros(0, top_k)
    )


@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 40), top_k=st.integers(1, 8), text=taus, vision=taus, decode=taus)
def test_keeps_exactly_the_pairs_at_or_above_their_groups_threshold(
    seed: int, tokens: int, top_k: int, text: float, vision: float, decode: float
) -> None:
    rule = reference.rule(3, text, vision, decode=decode, seed=seed)
    pi = random_pi(tokens, top_k, seed)
    group = torch.randint(0, len(GROUPS), (tokens,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    for layer in range(3):
        kept = rule.keep(pi, layer, group)
        assert kept.dtype == torch.bool
        assert torch.equal(kept, reference.keep(rule, pi, layer, group))
        assert bool(kept[group == SPECIAL].all())


@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 20))
def test_a_scale_per_expert_is_that_of_the_pairs_expert(seed: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 0.2 + torch.rand(2, len(GROUPS), EXPERTS, generator=generator)
    rule = Rule(scale, tau_vector({"text": 0.2, "vision": 0.3}))
    pi = random_pi(tokens, 4, seed)
    group = torch.randint(0, len(GROUPS), (tokens,), generator=generator)
    experts = torch.randint(0, EXPERTS, (tokens, 4), generator=generator)
    kept = rule.keep(pi, 1, group, experts)
    for t in range(tokens):
        for j in range(4):
            g = int(group[t])
            assert bool(kept[t, j]) == bool(scale[1, g, experts[t, j]] * pi[t, j] >= rule.tau[g])


@given(seed=st.integers(0, 2**31), slot=st.integers(0, 7))
def test_a_pair_on_the_threshold_is_kept_and_just_below_it_is_not(seed: int, slot: int) -> None:
    pi = random_pi(1, 8, seed)
    scale = reference.rule(1, 0, 0, seed=seed).score_scale
    on = scale[0, VISION] * pi[0, slot]
    group = torch.tensor([VISION])
    above = torch.nextafter(on, torch.tensor(math.inf))
    assert bool(Rule(scale, on.repeat(len(GROUPS))).keep(pi, 0, group)[0, slot])
    assert not bool(Rule(scale, above.repeat(len(GROUPS))).keep(pi, 0, group)[0, slot])


def test_zero_thresholds_keep_everything_and_infinite_ones_nothing() -> None:
    pi, group = torch.full((4, 4), 0.25), torch.tensor([TEXT, VISION, DECODE, VISION])
    for tau, kept in ((0.0, 16), (math.inf, 0)):
        rule = reference.rule(1, tau, tau)
        assert int(rule.keep(pi, 0, group).sum()) == kept
        assert rule.keeps_all == (kept == 16)


def test_a_broken_token_is_not_turned_into_a_skipped_one() -> None:
    """As in the kernels (modes.h): its NaN shows in its own output."""
    pi, group = torch.full((3, 4), 0.25), torch.tensor([TEXT, VISION, DECODE])
    pi[1, 2] = math.nan
    kept = reference.rule(1, math.inf, math.inf).keep(pi, 0, group)
    assert kept.nonzero().tolist() == [[1, 2]]


def test_with_tau_changes_nothing_else() -> None:
    rule = reference.rule(2, 0, 0, seed=1)
    other = rule.with_tau({"vision": 0.5})
    assert other.tau.tolist() == [0.0, 0.5, 0.0, 0.0, 0.0]
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


@pytest.mark.parametrize(
    ("tau", "vector"),
    [
        ({}, [0.0, 0.0, 0.0, 0.0, 0.0]),
        ({"vision": 0.25}, [0.0, 0.25, 0.0, 0.0, 0.0]),
        ({"text": math.inf, "vision": 1, "special": 0.0}, [math.inf, 1.0, math.inf, 0.0, 0.0]),
        ({"text": 0.5, "decode": 0.25, "audio": 0.125}, [0.5, 0.0, 0.25, 0.125, 0.0]),
        ({"text": 0.5, "decode": 0.0}, [0.5, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tau_vector_puts_thresholds_where_groups_are(tau: dict[str, float], vector: list[float]) -> None:
    assert tau_vector(tau).tolist() == vector


@pytest.mark.parametrize(
    ("tau", "named"),
    [
        ({"sound": 0.1}, "`sound`"),
        ({"special": 0.1}, "`special`"),
        ({"text": -0.1}, "`-0.1`"),
        ({"vision": math.nan}, "`nan`"),
        ({"x": 0, "y": 0}, "`x, y`"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(tau: dict[str, float], named: str) -> None:
    with pytest.raises(BadOption, match=named):
        tau_vector(tau)


# What each policy multiplies pi with at text, vision and decode: from alpha over all, text and vision tokens.
SCALES = {
    ("modes",): lambda a, t, v: (a, a, a),
    ("modes", ("per_modality", 1.0)): lambda a, t, v: (t, v, t),
    ("gmlg",): lambda a, t, v: (a, a, a),
    ("dmt",): lambda a, t, v: (1.0, 1.0, 1.0),
    ("threshold",): lambda a, t, v: (1.0, 1.0, 1.0),
    ("tempered", ("power", 0.25)): lambda a, t, v: (a**0.25, a**0.25, a**0.25),
    ("tempered", ("power", 0.5), ("per_modality", 1.0)): lambda a, t, v: (t**0.5, v**0.5, t**0.5),
    ("tempered", ("power", 1.0)): lambda a, t, v: (a, a, a),
    ("tempered", ("power", 0.0)): lambda a, t, v: (1.0, 1.0, 1.0),
}
SCALED = [*SCALES, ("grouped",), ("norm",)]
FORMULAS = ("topk", "naee", "mcmoe", "diep", "topp", "random", "predicted", "salient")


@pytest.mark.parametrize("named", SCALES, ids=str)
def test_score_scales_of_each_policy(named: tuple[str, *tuple[tuple[str, float], ...]]) -> None:
    name, *parameters = named
    calibration = measured()
    made = policy(str(name), **dict(parameters)).rule(calibration, {"text": 0.5, "vision": 0.25})  # type: ignore[arg-type]
    assert made.tau.tolist() == [0.5, 0.25, 0.5, 0.0, 0.0]
    assert made.score_scale.shape == (LAYERS, len(GROUPS))
    assert made.score_scale.dtype == torch.float32
    assert made.contribution is None
    for row, layer in zip(made.score_scale.tolist(), calibration.calibration.importance.values(), strict=True):
        assert row[:3] == pytest.approx(SCALES[named](layer.all, layer.text, layer.vision), rel=1e-6)


@pytest.mark.parametrize("power", [0.0, 0.25, 1.0])
def test_grouped_prices_one_token_of_each_group(power: float) -> None:
    calibration = measured()
    scale = policy("grouped", power=power).rule(calibration, {}).score_scale.double()
    columns = {TEXT: "kl_prompt", VISION: "kl_vision", DECODE: "kl_decode"}
    price = {
        (i, g): getattr(layer, column) / TOKENS[GROUPS[g]]
        for i, layer in enumerate(calibration.calibration.importance.values())
        for g, column in columns.items()
    }
    for (layer, g), value in price.items():
        assert float(scale[layer, g]) == pytest.approx((value / max(price.values())) ** power, rel=1e-6)


@pytest.mark.parametrize("grouped", [0.0, 1.0])
def test_norm_multiplies_a_scale_with_the_mean_norm_of_each_expert(grouped: float) -> None:
    calibration = measured()
    made = policy("norm", power=0.5, grouped=grouped).rule(calibration, {}).score_scale
    other = policy("grouped", power=0.5) if grouped else policy("tempered", power=0.5)
    scale, norms = other.rule(calibration, {}).score_scale, calibration.tensors["output_norm"]
    assert made.shape == (LAYERS, len(GROUPS), EXPERTS)
    torch.testing.assert_close(made, scale[:, :, None] * norms / norms.max())


def test_every_policy_is_tested_and_listed() -> None:
    assert policy_names() == sorted({name for name, *_ in SCALED} | set(FORMULAS))
    single = ["diep", "gmlg", "mcmoe", "naee", "random", "threshold", "topk", "topp"]
    assert [name for name in policy_names() if policy(name).one_threshold] == single


def test_only_attention_cannot_be_exported() -> None:
    assert [name for name in policy_names() if not policy(name).exportable] == ["mcmoe"]
    assert "attention" in policy("mcmoe").obstacle


@pytest.mark.parametrize("name", ["modes", "tempered", "grouped", "norm", "predicted"])
def test_a_layer_without_importance_has_score_zero_and_no_nan(name: str) -> None:
    kl = torch.full((LAYERS, 5), 0.1)
    kl[0] = 0.0
    scale = policy(name).rule(measured(kl), {}).score_scale
    assert not scale[0, :3].any()
    assert scale[1:, :3].all()
    assert not scale.isnan().any()


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadOption, match="no policy `magic`") as caught:
        policy("magic")
    assert all(name in str(caught.value.hint) for name in policy_names())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tempered", {"power": 1.5}),
        ("tempered", {"power": -0.1}),
        ("tempered", {"power": math.nan}),
        ("tempered", {"per_modality": 0.5}),
        ("modes", {"per_modality": 2}),
        ("grouped", {"power": 2}),
        ("norm", {"power": -1}),
        ("norm", {"grouped": 0.5}),
        ("predicted", {"power": math.nan}),
        ("mcmoe", {"protected": 1.5}),
        ("random", {"seed": 0.5}),
        ("random", {"seed": -1}),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, parameters: dict[str, float]) -> None:
    with pytest.raises(BadOption, match=f"policy `{name}` with "):
        policy(name, **parameters)


@pytest.mark.parametrize(
    ("name", "needed"),
    [("naee", "slot_ratio"), ("diep", "expert_similarity"), ("norm", "output_norm"), ("predicted", "norm_predictor")],
)
def test_a_calibration_without_what_a_policy_needs_is_refused(name: str, needed: str) -> None:
    calibration = measured()
    less = dataclasses.replace(calibration, tensors={key: t for key, t in calibration.tensors.items() if key != needed})
    with pytest.raises(BadArtifact, match=f"tensor `{needed}`"):
        policy(name).rule(less, {})
    wrong = dataclasses.replace(calibration, tensors={**calibration.tensors, needed: torch.ones(2, 2)})
    with pytest.raises(BadArtifact, match=f"tensor `{needed}`.*should be"):
        policy(name).rule(wrong, {})


def test_a_registered_policy_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    @register("doubled")
    class Doubled(Policy):
        def scale(self, measured: object) -> torch.Tensor:
            return torch.full((LAYERS, len(GROUPS)), 2.0, dtype=torch.float64)

    made = policy("doubled")
    assert made.name == "doubled"
    assert bool((made.rule(measured(), {}).score_scale == 2).all())
    monkeypatch.delitem(REGISTRY, "doubled")


@pytest.mark.parametrize(
    ("name", "parameters"), [("tempered", {"power": 0.5, "per_modality": 1.0}), ("gmlg", {}), ("predicted", {"power": 0.5})]
)
def test_a_search_result_gives_its_rule_back(name: str, parameters: dict[str, float]) -> None:
    calibration, tau = measured(), {"text": 0.125, "vision": 0.5}
    result = SearchResult.model_construct(policy=name, parameters=parameters, tau=tau)
    expected = policy(name, **parameters).rule(calibration, tau)
    assert from_result(result, calibration).key == expected.key
    assert expected.tau.tolist() == [0.125, 0.5, 0.125, 0.0, 0.0]
