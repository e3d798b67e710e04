"""Which tokens lose experts, and what is computed and counted for them, seen at the experts of each layer."""

import math
from collections.abc import Callable

import pytest
import torch

from modes_cli.models.groups import DECODE, GROUPS, SPECIAL, TEXT, VISION, TokenGroups
from modes_cli.skipping.policy import Rule, routing_probability
from modes_cli.skipping.routing import Routing
from modes_cli.skipping.statistics import PairCounts
from tests.families import END, FAMILIES, START, TOKENS, TOP_K
from tests.skipping import reference
from tests.skipping.conftest import Subject

NEW = 4
THRESHOLDS: dict[str, dict[str, float]] = {
    "vision-only": {"text": 0.0, "vision": math.inf},
    "text-only": {"text": math.inf, "vision": 0.0},  # decode goes with text
    "decode-only": {"text": 0.0, "vision": 0.0, "decode": math.inf},
    "some-of-each": {"text": 0.22, "vision": 0.3, "decode": 0.18},
    "all": {"text": math.inf, "vision": math.inf},
}
ALL_SKIPPED = {"vision-only": (VISION,), "text-only": (TEXT, DECODE), "decode-only": (DECODE,)}


@torch.no_grad()
def generate(
    subject: Subject, rule: Rule, *, use_operator: bool = True
) -> tuple[list[reference.Call], torch.Tensor, PairCounts]:
    """Greedy text under a rule: the experts' calls, the ids fed in each of the NEW forwards joined, the counts."""
    with (
        subject.engine(use_operator=use_operator) as engine,
        reference.listening(subject.blocks) as calls,
        engine.using(rule=rule) as counts,
    ):
        text = subject.model.generate(**subject.inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return calls, text[:, :-1], counts  # the last token is not fed


def fed(subject: Subject, ids: torch.Tensor, step: int) -> torch.Tensor:
    """The ids of one forward: the prompt, then one token of each sample at a time."""
    prompt = subject.inputs["input_ids"].shape[1]
    return ids[:, :prompt] if step == 0 else ids[:, prompt + step - 1 : prompt + step]


def groups(subject: Subject, ids: torch.Tensor, step: int) -> torch.Tensor:
    """Those of one forward's tokens; only prompts have padding."""
    return reference.groups(TOKENS, fed(subject, ids, step), subject.inputs["attention_mask"] if step == 0 else None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize("use_operator", [True, False])
def test_exactly_the_pairs_of_the_rule_in_prefill_and_decode(
    family: str, thresholds: str, use_operator: bool, subject: Callable[[str], Subject]
) -> None:
    it = subject(family)
    rule = reference.rule(len(it.blocks), **THRESHOLDS[thresholds], seed=5)
    calls, ids, _ = generate(it, rule, use_operator=use_operator)
    assert len(calls) == NEW * len(it.blocks)
    for number, call in enumerate(calls):
        step = number // len(it.blocks)
        group = groups(it, ids, step)
        kept = reference.keep(rule, reference.probability(call.weights), call.block.index, group)
        expected = reference.experts_output(call.block, call.hidden, call.index, call.weights, kept)
        torch.testing.assert_close(call.output, expected, atol=2e-5, rtol=1e-4)
        assert not call.output[~kept.any(-1)].any()  # exactly 0
        if thresholds in ALL_SKIPPED:
            assert torch.equal(kept.all(-1), ~torch.isin(group, torch.tensor(ALL_SKIPPED[thresholds])))


def test_special_tokens_are_never_skipped(qwen: Subject) -> None:
    rule = reference.rule(len(qwen.blocks), math.inf, math.inf)
    calls, ids, counts = generate(qwen, rule)
    marks = torch.isin(fed(qwen, ids, 0), torch.tensor([START, END])).reshape(-1)
    for call in calls[: len(qwen.blocks)]:
        assert torch.equal(call.output.any(-1), marks)
    assert torch.equal(counts.kept[:, :, SPECIAL], counts.total[:, :, SPECIAL])
    assert int(counts.total[:, :, SPECIAL].sum()) > 0
    assert int(counts.kept[:, :, [TEXT, VISION, DECODE]].sum()) == 0


def test_counts_by_phase_layer_and_group_without_padding(qwen: Subject) -> None:
    rule = reference.rule(len(qwen.blocks), 0.25, 0.3, decode=0.2, seed=2)
    calls, ids, counts = generate(qwen, rule)
    real = qwen.inputs["attention_mask"].bool().reshape(-1)
    assert not real.all()  # the second sample is padded on the left
    kept, total = torch.zeros_like(counts.kept), torch.zeros_like(counts.total)
    for number, call in enumerate(calls):
        step = number // len(qwen.blocks)
        group = groups(qwen, ids, step)
        pairs = reference.keep(rule, reference.probability(call.weights), call.block.index, group).sum(-1)
        counted = real if step == 0 else torch.ones_like(group, dtype=torch.bool)
        for g in range(len(GROUPS)):
            kept[int(step > 0), call.block.index, g] += int(pairs[counted & (group == g)].sum())
            total[int(step > 0), call.block.index, g] += TOP_K * int((counted & (group == g)).sum())
    assert torch.equal(counts.kept, kept)
    assert torch.equal(counts.total, total)
    assert int(counts.total[0].sum()) == TOP_K * int(real.sum()) * len(qwen.blocks)
    assert int(counts.total[1].sum()) == TOP_K * len(ids) * (NEW - 1) * len(qwen.blocks)
    assert 0 < counts.skip_ratio() < 1
    assert int(counts.total[0, 0, DECODE]) == TOP_K * len(ids)  # the last token of each prompt
    assert int(counts.total[1, 0, DECODE]) == int(counts.total[1, 0].sum()) - int(counts.total[1, 0, SPECIAL])


@torch.no_grad()
def test_left_padding_changes_no_answer(qwen: Subject) -> None:
    padding = int((qwen.inputs["attention_mask"][1] == 0).sum())
    patches = int(qwen.inputs["image_grid_thw"][0].prod())
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    alone = {name: qwen.inputs[name][1:, padding:] for name in names}
    alone |= {"pixel_values": qwen.inputs["pixel_values"][patches:], "image_grid_thw": qwen.inputs["image_grid_thw"][1:]}
    with qwen.engine() as engine, engine.using(rule=reference.rule(len(qwen.blocks), 0.25, 0.3, decode=0.2, seed=2)):
        together = qwen.model(**qwen.inputs).logits[1:, padding:]
        torch.testing.assert_close(together, qwen.model(**alone).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "kimi_k25", "internvl_gpt_oss"])
@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_skipped_pairs_are_never_computed(family: str, thresholds: str, subject: Callable[[str], Subject]) -> None:
    it = subject(family)
    rule = reference.rule(len(it.blocks), **THRESHOLDS[thresholds], seed=5)
    group = reference.groups(TOKENS, it.inputs["input_ids"], it.inputs["attention_mask"])
    with (
        reference.counting(it.inner) as computed,
        it.engine(use_operator=False) as engine,
        reference.listening(it.blocks) as calls,
        engine.using(rule=rule),
    ):
        it.model(**it.inputs)
    wanted = []
    for call in calls:
        kept = reference.keep(rule, reference.probability(call.weights), call.block.index, group)
        if kept.any():
            wanted.append(call.index[kept].sort().values)
    assert computed.rows == [len(experts) for experts in wanted]
    for found, experts in zip(computed.experts, wanted, strict=True):
        assert torch.equal(found.reshape(-1).sort().values, experts)


@torch.no_grad()
def test_nothing_is_computed_where_all_is_skipped(qwen: Subject) -> None:
    with reference.counting(qwen.inner) as computed, qwen.engine(TokenGroups(TOKENS.vision_ids, ())) as engine:
        with engine.using(rule=reference.rule(len(qwen.blocks), math.inf, math.inf)):
            qwen.model(**qwen.inputs)
        assert computed.rows == []
        qwen.model(**qwen.inputs)
        assert computed.rows == [qwen.inputs["input_ids"].numel() * TOP_K] * len(qwen.blocks)


@torch.no_grad()
def test_watching_shows_the_routing_of_real_tokens(qwen: Subject) -> None:
    seen: list[Routing] = []
    with qwen.engine() as engine, reference.listening(qwen.blocks) as calls:
        with engine.using(watch=seen.append):
            qwen.model(**qwen.inputs)
        qwen.model(**qwen.inputs)
    real = qwen.inputs["attention_mask"].bool().reshape(-1)
    group = reference.groups(TOKENS, qwen.inputs["input_ids"], qwen.inputs["attention_mask"])[real]
    assert [routing.layer for routing in seen] == [block.index for block in qwen.blocks]
    for routing, call in zip(seen, calls, strict=False):
        assert torch.equal(routing.pi, routing_probability(call.weights)[real])
        assert torch.equal(routing.experts, call.index[real])
        assert torch.equal(routing.group, group)
        assert torch.equal(routing.hidden, call.hidden[real])
        assert (routing.block, routing.keep) == (call.block, None)
        rows, experts, ones = routing.hidden[:3], routing.experts[:3, :1], torch.ones(3, 1)
        expected = reference.experts_output(call.block, rows, experts, ones, ones > 0)
        torch.testing.assert_close(routing.compute(rows, experts, ones), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("use_operator", [True, False])
def test_watching_beside_a_rule_shows_what_it_keeps(use_operator: bool, qwen: Subject) -> None:
    seen: list[Routing] = []
    rule = reference.rule(len(qwen.blocks), 0.25, 0.3, decode=0.2, seed=2)
    with qwen.engine(use_operator=use_operator) as engine:
        with engine.using(rule=rule):
            logits = qwen.model(**qwen.inputs).logits
        with engine.using(rule=rule, watch=seen.append) as counts:
            assert torch.equal(qwen.model(**qwen.inputs).logits, logits)
        kept = counts.kept[0].sum(-1)
    assert [routing.layer for routing in seen] == [block.index for block in qwen.blocks]
    for routing in seen:
        assert routing.keep is not None
        assert torch.equal(routing.keep, reference.keep(rule, routing.pi, routing.layer, routing.group))
        assert int(routing.keep.sum()) == int(kept[routing.layer])


@torch.no_grad()
def test_groups_from_embeddings_are_those_of_the_ids(subject: Callable[[str], Subject]) -> None:
    it = subject("internvl_qwen3_moe")
    rule = reference.rule(len(it.blocks), 0.22, 0.3, seed=5)
    ids = it.inputs["input_ids"]
    others = {name: value for name, value in it.inputs.items() if name != "input_ids"}
    with it.engine() as engine:
        with engine.using(rule=rule) as counts:
            logits, total = it.model(**it.inputs).logits, counts.total.clone()
        with engine.using(rule=rule) as counts:
            embeddings = it.model.get_input_embeddings()(ids)
            assert torch.equal(it.model(inputs_embeds=embeddings, **others).logits, logits)
            assert torch.equal(counts.total, total)


@torch.no_grad()
def test_a_prefill_in_two_pieces_is_one_prefill(subject: Callable[[str], Subject]) -> None:
    """If the engine is told that the first piece predicts no answer: it cannot know that another one follows."""
    it = subject("internvl_qwen3_moe")
    ids, ones = it.inputs["input_ids"], torch.ones_like(it.inputs["input_ids"])
    with it.engine() as engine, engine.using(rule=reference.rule(len(it.blocks), 0.22, 0.3, decode=0.1, seed=2)) as counts:
        whole = it.model(input_ids=ids).logits
        total, kept = counts.total.clone(), counts.kept.clone()
        counts.reset()
        with engine.answers_at(torch.zeros_like(ids[:, :9], dtype=torch.bool)):
            first = it.model(input_ids=ids[:, :9], attention_mask=ones[:, :9], use_cache=True)
        second = it.model(input_ids=ids[:, 9:], attention_mask=ones, past_key_values=first.past_key_values)
        assert torch.equal(counts.total, total)
        assert torch.equal(counts.kept, kept)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_samples_that_have_ended_are_padding(subject: Callable[[str], Subject]) -> None:
    """`generate` feeds the end token, and then padding for them until the last sample of the batch ends."""
    it = subject("internvl_qwen3_moe")
    rule = reference.rule(len(it.blocks), 0.22, 0.3, seed=2)
    prompt, pad = it.inputs["input_ids"].shape[1], 0
    with it.engine() as engine, engine.using(rule=rule) as counts:
        plain = it.model.generate(**it.inputs, max_new_tokens=NEW, do_sample=False)
        end = int(plain[0, prompt + 1])
        assert end not in plain[1].tolist()
        assert pad not in plain[:, prompt:].tolist()
        counts.reset()
        engine.ended = (pad, end)
        text = it.model.generate(**it.inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=pad)
    ended = int(((text[:, prompt:-1] == pad) | (text[:, prompt:-1] == end)).sum())
    assert ended > 1
    assert int(counts.total[1].sum()) == TOP_K * (2 * (NEW - 1) - ended) * len(it.blocks)


@torch.no_grad()
def test_forwards_that_hold_answers_are_told_where(qwen: Subject) -> None:
    """As when measuring: prompt and answer in one forward; the marked tokens are `decode` as far as they are text."""
    ids, mask = qwen.inputs["input_ids"], qwen.inputs["attention_mask"].bool()
    decoding = torch.zeros_like(mask)
    decoding[:, 3:] = True  # from before the images on
    assert (TOKENS.of(ids)[decoding] == SPECIAL).any()
    by_id = TOKENS.of(ids)
    expected = torch.where(decoding & (by_id == TEXT), DECODE, by_id)[mask]
    seen: list[Routing] = []
    with qwen.engine() as engine:
        with engine.answers_at(decoding), engine.using(watch=seen.append):
            qwen.model(**qwen.inputs)
        with pytest.raises(ZeroDivisionError), engine.answers_at(decoding):
            raise ZeroDivisionError
        with engine.using(watch=seen.append):  # and then again the last token of each row
            qwen.model(**qwen.inputs)
    assert torch.equal(seen[0].group, expected)
    assert torch.equal(seen[-1].group, reference.groups(TOKENS, ids, mask)[mask.reshape(-1)])
