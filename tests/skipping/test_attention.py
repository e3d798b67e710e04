"""Attention received, against loops, and a rule that looks at it in whole models."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from modes_cli.errors import ModesError
from modes_cli.models.groups import GROUPS
from modes_cli.skipping.attention import places, received
from modes_cli.skipping.policies.mcmoe import ProtectedRatio
from modes_cli.skipping.policy import Rule, tau_vector
from modes_cli.skipping.routing import Routing
from tests.skipping.conftest import Subject, make


def masks(seed: int, rows: int, length: int) -> Tensor:
    """Padding on the left of some rows."""
    padding = torch.randint(0, length, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(length) >= padding


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 3), length=st.integers(1, 7))
def test_received_is_the_mean_over_the_tokens_that_see_it(seed: int, rows: int, length: int) -> None:
    real = masks(seed, rows, length)
    weights = torch.rand(rows, length, length, generator=torch.Generator().manual_seed(seed))
    found = received(weights, real)
    for b in range(rows):
        for key in range(length):
            given_to = [float(weights[b, query, key]) for query in range(key, length) if real[b, query]]
            assert float(found[b, key]) == pytest.approx(sum(given_to) / max(1, len(given_to)), abs=1e-6)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 3), length=st.integers(1, 7))
def test_places_count_the_more_important(seed: int, rows: int, length: int) -> None:
    real = masks(seed, rows, length)
    importance = torch.randint(0, 4, (rows, length), generator=torch.Generator().manual_seed(seed)).float()
    found = places(importance, real)
    for b in range(rows):
        count = int(real[b].sum())
        for t in range(length):
            higher = (importance[b] > importance[b, t]) | ((importance[b] == importance[b, t]) & (torch.arange(length) < t))
            expected = int((higher & real[b]).sum()) / count if real[b, t] and count > 1 else 1.0
            assert float(found[b, t]) == pytest.approx(expected)


# -- in a model ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen3_vl_moe", "internvl_gpt_oss", "kimi_k25"])
def subject(request: pytest.FixtureRequest, one_thread: None) -> Subject:
    return make(str(request.param))


def rule(subject: Subject, tau: float, protected: float) -> Rule:
    layers, k = len(subject.blocks), subject.blocks[0].top_k
    contribution = ProtectedRatio({"share": torch.ones(layers, k)}, {"protected": protected})
    return Rule(torch.ones(layers, len(GROUPS)), tau_vector({"text": tau, "vision": tau}), contribution)


def attention_of(subject: Subject) -> dict[int, Tensor]:
    """Of a forward with eager attention, as transformers returns it: mean over heads, by decoder layer."""
    config = subject.model.get_decoder().config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        out: Any = subject.model(**subject.inputs, output_attentions=True)
    finally:
        config._attn_implementation = before
    return {layer: weights.float().mean(1) for layer, weights in enumerate(out.attentions)}


@pytest.fixture
def seen() -> list[Routing]:
    return []


@torch.no_grad()
def test_protected_tokens_are_those_that_receive_most_times_their_norm(subject: Subject, seen: list[Routing]) -> None:
    attention, real = attention_of(subject), subject.inputs["attention_mask"].bool()
    before = subject.model.get_decoder().config._attn_implementation
    with subject.engine() as engine, engine.using(rule=rule(subject, 0.0, 0.25), watch=seen.append):
        subject.model(**subject.inputs)
    assert subject.model.get_decoder().config._attn_implementation == before
    assert len(seen) == len(subject.blocks)
    for routing in seen:
        assert routing.score is not None
        importance = torch.zeros(real.shape)
        importance[real] = routing.hidden.abs().sum(-1)
        importance *= received(attention[routing.block.layer], real)
        protected = (places(importance, real) < 0.25)[real]
        assert torch.equal((routing.score == 1.0).all(1), protected)
        assert 0.2 < float(protected.float().mean()) < 0.35


@torch.no_grad()
def test_protected_tokens_keep_all_and_the_attention_is_given_back(subject: Subject) -> None:
    config = subject.model.get_decoder().config
    before, plain = config._attn_implementation, subject.model(**subject.inputs).logits
    with subject.engine() as engine:
        with engine.using(rule=rule(subject, 0.9, 1.0)) as counts:
            subject.model(**subject.inputs)
        assert counts.skip_ratio() == 0.0
        with engine.using(rule=rule(subject, 0.9, 0.25)) as counts:
            subject.model(**subject.inputs)
        some = counts.skip_ratio()
        with engine.using(rule=rule(subject, 0.9, 0.0)) as counts:
            subject.model(**subject.inputs)
        assert 0 < some < counts.skip_ratio()
        assert torch.equal(subject.model(**subject.inputs).logits, plain)
        with engine.using(rule=rule(subject, 0.9, 0.25), watch=lambda _: 1 / 0), pytest.raises(ZeroDivisionError):
            subject.model(**subject.inputs)  # fails in the middle
        assert config._attn_implementation == before
    assert torch.equal(subject.model(**subject.inputs).logits, plain)


@torch.no_grad()
def test_a_token_that_is_decoded_alone_is_not_protected(subject: Subject, seen: list[Routing]) -> None:
    ids = torch.tensor([[40], [41]])
    with subject.engine() as engine, engine.using(rule=rule(subject, 0.0, 0.9), watch=seen.append):
        subject.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    for routing in seen:
        assert routing.score is not None
        assert not bool((routing.score == 1.0).all(1).any())


@torch.no_grad()
def test_a_model_whose_attention_gives_no_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make("qwen3_vl_moe")
    layers = [subject.model.get_submodule(block.moe.rpartition(".")[0]) for block in subject.blocks]
    for layer in layers:
        forward = layer.self_attn.forward
        monkeypatch.setattr(layer.self_attn, "forward", lambda *args, _f=forward, **kwargs: (_f(*args, **kwargs)[0], None))
    with subject.engine() as engine, engine.using(rule=rule(subject, 0.5, 0.02)):
        with pytest.raises(ModesError, match="gives no attention weights"):
            subject.model(**subject.inputs)
        assert subject.model.get_decoder().config._attn_implementation != "eager"
