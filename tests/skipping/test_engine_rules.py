"""Rules with a scale per expert, and rules that look at more than pi: what they keep, at the experts of each layer."""

import torch
from torch import Tensor

from modes_cli.models.groups import DECODE, GROUPS, TEXT, VISION
from modes_cli.skipping.contribution import Contribution, Pairs
from modes_cli.skipping.policy import Rule, tau_vector
from tests.families import TOKENS
from tests.skipping import reference
from tests.skipping.conftest import Subject

TAU = {"text": 0.2, "vision": 0.3, "decode": 0.1}


class Length(Contribution):
    """pi times the length of the token's hidden state, as a share of the longest."""

    key = "length"

    def __call__(self, pairs: Pairs) -> Tensor:
        assert pairs.hidden is not None
        length = pairs.hidden.float().norm(dim=-1, keepdim=True)
        return pairs.pi * length / length.amax()


@torch.no_grad()
def check(subject: Subject, rule: Rule, *, use_operator: bool) -> None:
    """Every layer's output is that of the pairs that the definition keeps, one by one; the counts are theirs."""
    group = reference.groups(TOKENS, subject.inputs["input_ids"], subject.inputs["attention_mask"])
    real = subject.inputs["attention_mask"].bool().reshape(-1)
    layers, experts = len(subject.blocks), subject.blocks[0].num_experts
    scale = rule.score_scale.reshape(layers, len(GROUPS), -1).expand(-1, -1, experts)
    with (
        subject.engine(use_operator=use_operator) as engine,
        reference.listening(subject.blocks) as calls,
        engine.using(rule=rule) as counts,
    ):
        subject.model(**subject.inputs)
    for call in calls:
        layer, pi = call.block.index, reference.probability(call.weights)
        if rule.contribution is not None:
            length = call.hidden.norm(dim=-1)
            pi = pi * length[:, None] / length.max()
        kept = torch.zeros_like(call.index, dtype=torch.bool)
        for token, row in enumerate(call.index.tolist()):
            for slot, expert in enumerate(row):
                g = int(group[token])
                kept[token, slot] = scale[layer, g, expert] * pi[token, slot] >= rule.tau[g]
        expected = reference.experts_output(call.block, call.hidden, call.index, call.weights, kept)
        torch.testing.assert_close(call.output, expected, atol=2e-5, rtol=1e-4)
        for g in range(len(GROUPS)):
            assert int(counts.kept[0, layer, g]) == int(kept[real & (group == g)].sum())
    assert 0 < counts.skip_ratio() < 1


def per_expert(subject: Subject) -> Tensor:
    layers, experts = len(subject.blocks), subject.blocks[0].num_experts
    return 0.2 + 1.6 * torch.rand(layers, len(GROUPS), experts, generator=torch.Generator().manual_seed(4))


def test_a_scale_per_expert(qwen: Subject) -> None:
    for use_operator in (True, False):
        check(qwen, Rule(per_expert(qwen), tau_vector(TAU)), use_operator=use_operator)


def test_a_contribution_of_the_token(qwen: Subject) -> None:
    scale = torch.ones(len(qwen.blocks), len(GROUPS))
    scale[:, [TEXT, VISION, DECODE]] = torch.tensor([1.0, 1.5, 0.7])
    for use_operator in (True, False):
        check(qwen, Rule(scale, tau_vector(TAU), Length()), use_operator=use_operator)


def test_rules_with_other_contributions_are_other_rules() -> None:
    class Other(Length):
        key = "other"

    scale, tau = torch.ones(2, len(GROUPS)), tau_vector(TAU)
    rules = [Rule(scale, tau, what) for what in (None, Length(), Other())] + [Rule(scale * 2, tau), Rule(scale, tau / 2)]
    assert len({rule.key for rule in rules}) == len(rules)
    assert Rule(scale.clone(), tau.clone(), Length()).key == rules[1].key
    assert rules[1].with_tau({"text": 0.5}).contribution is rules[1].contribution
