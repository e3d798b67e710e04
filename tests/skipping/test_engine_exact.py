"""Skipping nothing changes no bit; skipping everything is what models without routed experts give, bit for bit."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modes_cli.data.sample import Sample
from modes_cli.models.groups import DECODE, TEXT, VISION, TokenGroups
from modes_cli.models.inputs import prompt_batch
from modes_cli.models.loading import Loaded
from modes_cli.skipping.engine import SkipEngine
from tests.families import FAMILIES, TOKENS
from tests.skipping import reference
from tests.skipping.conftest import Subject

EVERYTHING = TokenGroups(TOKENS.vision_ids, special_ids=())  # special tokens lose theirs too
IMPLEMENTATIONS = [
    *[(family, name) for family in FAMILIES if family != "step3p7" for name in ("grouped_mm", "eager")],
    ("qwen3_vl_moe", "batched_mm"),
    ("internvl_gpt_oss", "batched_mm"),
]


@torch.no_grad()
def answers(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[list[int]]]:
    """All logits, and greedy text."""
    return model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()


def in_bfloat16(subject: Subject) -> Subject:
    from modes_cli.models.blocks import find_moe_blocks

    model = copy.deepcopy(subject.model).to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in subject.inputs.items()}
    return Subject(model, inputs, find_moe_blocks(model))


def assert_zero_thresholds_change_nothing(subject: Subject) -> None:
    logits, text = answers(subject.model, subject.inputs)
    with subject.engine() as engine, engine.using(rule=reference.rule(len(subject.blocks), 0.0, 0.0)) as counts:
        skipping_logits, skipping_text = answers(subject.model, subject.inputs)
        assert int(counts.total.sum()) > 0
        assert torch.equal(counts.kept, counts.total)
    assert torch.equal(skipping_logits, logits)
    assert skipping_text == text


def assert_infinite_thresholds_remove_all_routed_experts(subject: Subject) -> None:
    without = copy.deepcopy(subject.model)
    for block in subject.blocks:
        experts: Any = without.get_submodule(block.name)
        experts.down_proj.zero_()
        if block.has_bias:
            experts.down_proj_bias.zero_()
    logits, text = answers(without, subject.inputs)
    with (
        subject.engine(EVERYTHING) as engine,
        engine.using(rule=reference.rule(len(subject.blocks), math.inf, math.inf)) as counts,
    ):
        skipping_logits, skipping_text = answers(subject.model, subject.inputs)
        assert int(counts.kept.sum()) == 0
        assert counts.skip_ratio() == 1.0
    assert torch.equal(skipping_logits, logits)
    assert skipping_text == text
    assert not torch.equal(logits, answers(subject.model, subject.inputs)[0])


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_zero_thresholds(family: str, implementation: str, subject: Callable[[str], Subject]) -> None:
    with subject(family).implementation(implementation):
        assert_zero_thresholds_change_nothing(subject(family))


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_infinite_thresholds(family: str, implementation: str, subject: Callable[[str], Subject]) -> None:
    with subject(family).implementation(implementation):
        assert_infinite_thresholds_remove_all_routed_experts(subject(family))


def test_experts_outside_the_interface(subject: Callable[[str], Subject]) -> None:
    assert_zero_thresholds_change_nothing(subject("step3p7"))
    assert_infinite_thresholds_remove_all_routed_experts(subject("step3p7"))


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "kimi_k25"])
def test_bfloat16(family: str, subject: Callable[[str], Subject]) -> None:
    half = in_bfloat16(subject(family))
    assert_zero_thresholds_change_nothing(half)
    assert_infinite_thresholds_remove_all_routed_experts(half)


def test_the_built_in_model_answers_as_before(digits: Loaded, small_samples: Callable[..., list[Sample]]) -> None:
    inputs = prompt_batch(digits, small_samples(4)).inputs
    subject = Subject(digits.model, inputs, digits.blocks)
    assert_zero_thresholds_change_nothing(subject)


@torch.no_grad()
def test_dropping_a_layer_is_zeroing_its_routed_experts(qwen: Subject) -> None:
    from modes_cli.skipping.routing import Drop

    for block in qwen.blocks:
        without = copy.deepcopy(qwen.model)
        without.get_submodule(block.name).down_proj.zero_()
        with qwen.engine() as engine, engine.using(drop=Drop(block.index)):
            assert torch.equal(qwen.model(**qwen.inputs).logits, without(**qwen.inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("groups", [(TEXT,), (DECODE,), (TEXT, DECODE), (VISION, DECODE)])
def test_dropping_some_groups_of_a_layer(groups: tuple[int, ...], qwen: Subject) -> None:
    from modes_cli.skipping.routing import Drop

    lost = torch.isin(reference.groups(TOKENS, qwen.inputs["input_ids"], qwen.inputs["attention_mask"]), torch.tensor(groups))
    last = qwen.blocks[-1].index
    with qwen.engine() as engine, reference.listening(qwen.blocks) as calls:
        qwen.model(**qwen.inputs)
        with engine.using(drop=Drop(last, groups)):
            qwen.model(**qwen.inputs)
    full, dropped = calls[last].output, calls[-1].output
    assert lost.any()
    assert not dropped[lost].any()
    torch.testing.assert_close(dropped[~lost], full[~lost], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_drop_counts_beside_a_rule(qwen: Subject) -> None:
    """Dropping one layer's vision tokens under a rule: what the rule keeps elsewhere stays."""
    from modes_cli.skipping.routing import Drop

    rule = reference.rule(len(qwen.blocks), 0.2, 0.2, seed=3)
    with qwen.engine() as engine, reference.listening(qwen.blocks) as calls, engine.using(rule=rule, drop=Drop(1, (VISION,))):
        qwen.model(**qwen.inputs)
    group = reference.groups(TOKENS, qwen.inputs["input_ids"], qwen.inputs["attention_mask"])
    for call in calls:
        kept = reference.keep(rule, reference.probability(call.weights), call.block.index, group)
        if call.block.index == 1:
            kept[group == VISION] = False
        torch.testing.assert_close(
            call.output, reference.experts_output(call.block, call.hidden, call.index, call.weights, kept), atol=1e-5, rtol=1e-4
        )


def test_two_models_in_one_process_do_not_meet(subject: Callable[[str], Subject]) -> None:
    """Interleaved forwards under different rules give what each gives alone."""
    first = subject("qwen3_vl_moe")
    second = Subject(copy.deepcopy(first.model), first.inputs, [])
    from modes_cli.models.blocks import find_moe_blocks

    second.blocks.extend(find_moe_blocks(second.model))
    rules = [reference.rule(len(first.blocks), text, vision) for text, vision in ((0.3, 0.0), (0.0, math.inf))]

    def alone(subject: Subject, rule: Any) -> tuple[Tensor, float]:
        with subject.engine() as engine, engine.using(rule=rule) as counts, torch.no_grad():
            return subject.model(**subject.inputs).logits, counts.skip_ratio()

    expected = [alone(first, rules[0]), alone(second, rules[1])]
    plain = answers(first.model, first.inputs)[0]
    assert not torch.equal(expected[0][0], expected[1][0])
    with (
        first.engine() as one,
        second.engine() as two,
        one.using(rule=rules[0]) as a,
        two.using(rule=rules[1]) as b,
        torch.no_grad(),
    ):
        found = [first.model(**first.inputs).logits, second.model(**second.inputs).logits]
        ratios = [a.skip_ratio(), b.skip_ratio()]
        with one.using():
            assert torch.equal(first.model(**first.inputs).logits, plain)
            assert torch.equal(second.model(**second.inputs).logits, expected[1][0])
    assert all(torch.equal(logits, wanted) for logits, (wanted, _) in zip(found, expected, strict=True))
    assert ratios == [ratio for _, ratio in expected]


def test_an_engine_that_does_nothing_passes_calls_on(qwen: Subject) -> None:
    plain = answers(qwen.model, qwen.inputs)
    with qwen.engine() as engine:
        assert torch.equal(answers(qwen.model, qwen.inputs)[0], plain[0])
        assert int(engine.counts.total.sum()) == 0
    assert isinstance(engine, SkipEngine)
