"""Skipping in a model on a GPU: the operator decides and counts, the host never waits, and a CUDA graph can be made of it.

Here CPU tensors are treated as a GPU's (tests/cuda/as_gpu.py); tests/cuda/test_torch_gpu.py has the real thing.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modes_cli.errors import KernelError
from modes_cli.models.groups import DECODE, GROUPS, SPECIAL, VISION
from modes_cli.runtime import libraries
from modes_cli.skipping.contribution import Contribution, Pairs
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.routing import Drop
from modes_cli.skipping.statistics import PairCounts
from tests.cuda.as_gpu import Emulated, install, watching, watching_the_engine
from tests.families import FAMILIES, TOKENS
from tests.skipping import reference
from tests.skipping.conftest import Subject, make

NEW = 3
THRESHOLDS: dict[str, dict[str, float]] = {
    "vision-only": {"text": 0.0, "vision": math.inf},
    "some-of-each": {"text": 0.22, "vision": 0.3, "decode": 0.18},
    "all-but-decode": {"text": math.inf, "vision": math.inf, "decode": 0.0},
}


@pytest.fixture
def emulated(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return install(emulated_library, monkeypatch)


@pytest.fixture(scope="module")
def models(one_thread: None) -> dict[str, Subject]:
    return {}


@pytest.fixture
def subject(models: dict[str, Subject]) -> Callable[[str], Subject]:
    return lambda family: models.setdefault(family, models.get(family) or make(family))


@pytest.fixture
def qwen(subject: Callable[[str], Subject]) -> Subject:
    return subject("qwen3_vl_moe")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def generate(subject: Subject, engine: SkipEngine, rule: object) -> tuple[list[reference.Call], torch.Tensor, PairCounts]:
    with reference.listening(subject.blocks) as calls, engine.using(rule=rule) as counts:  # type: ignore[arg-type]
        text = subject.model.generate(**subject.inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return calls, text[:, :-1], counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_exactly_the_pairs_of_the_rule(
    family: str, thresholds: str, emulated: Emulated, subject: Callable[[str], Subject]
) -> None:
    it = subject(family)
    rule = reference.rule(len(it.blocks), **THRESHOLDS[thresholds], seed=5)
    with it.engine() as engine:
        calls, ids, counts = generate(it, engine, rule)
        assert {found.name for found in engine.implementations} == {"modes"}
    prompt = it.inputs["input_ids"].shape[1]
    real = it.inputs["attention_mask"].bool().reshape(-1)
    kept, total = torch.zeros_like(counts.kept), torch.zeros_like(counts.total)
    assert len(calls) == NEW * len(it.blocks)
    for number, call in enumerate(calls):
        step, layer = number // len(it.blocks), call.block.index
        fed = ids[:, :prompt] if step == 0 else ids[:, prompt + step - 1 : prompt + step]
        group = reference.groups(TOKENS, fed, it.inputs["attention_mask"] if step == 0 else None)
        pairs = reference.keep(rule, reference.probability(call.weights), layer, group)
        expected = reference.experts_output(call.block, call.hidden, call.index, call.weights, pairs)
        torch.testing.assert_close(call.output, expected, atol=2e-5, rtol=1e-4)
        assert not call.output[~pairs.any(-1)].any()
        if thresholds == "vision-only":
            assert torch.equal(pairs.all(-1), group != VISION)
        if thresholds == "all-but-decode":
            assert torch.equal(pairs.any(-1), (group == DECODE) | (group == SPECIAL))
        counted = real if step == 0 else torch.ones_like(group, dtype=torch.bool)
        for g in range(len(GROUPS)):
            kept[int(step > 0), layer, g] += int(pairs[counted & (group == g)].sum())
            total[int(step > 0), layer, g] += call.index.shape[1] * int((counted & (group == g)).sum())
    assert torch.equal(counts.kept, kept)
    assert torch.equal(counts.total, total)


def test_zero_thresholds_are_the_unchanged_model_bit_for_bit(emulated: Emulated, qwen: Subject) -> None:
    logits = qwen.model(**qwen.inputs).logits
    with qwen.engine() as engine, engine.using(rule=reference.rule(len(qwen.blocks), 0.0, 0.0)) as counts:
        assert torch.equal(qwen.model(**qwen.inputs).logits, logits)
        assert emulated.calls == 0
        assert int(counts.total.sum()) > 0
        assert torch.equal(counts.kept, counts.total)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "internvl_gpt_oss", "step3p7"])
def test_the_host_waits_for_nothing_after_the_first_forward(
    family: str, emulated: Emulated, subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = subject(family)
    rule = reference.rule(len(it.blocks), 0.22, 0.3, seed=5)
    with it.engine() as engine, engine.using(rule=rule) as counts:
        with watching_the_engine(monkeypatch) as first:
            it.model(**it.inputs)
        assert first  # the comparison with the block reads numbers: what is watched for is seen
        launched = emulated.calls
        with watching_the_engine(monkeypatch) as later:
            it.model(**it.inputs)
        assert later == []
        assert emulated.calls == launched + len(it.blocks)
        assert 0 < counts.skip_ratio() < 1


def test_a_whole_decoding_step_waits_for_nothing(emulated: Emulated, qwen: Subject) -> None:
    ids = qwen.inputs["input_ids"][:, -1:]
    given = {"input_ids": ids, "position_ids": torch.zeros(3, *ids.shape, dtype=torch.int64), "use_cache": False}
    with qwen.engine() as engine, engine.using(rule=reference.rule(len(qwen.blocks), 0.22, 0.3, seed=5)):
        qwen.model(**given)
        with watching() as seen:
            qwen.model(**given)
    assert seen == []


def test_tokens_from_embeddings_wait_for_nothing(
    emulated: Emulated, subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = subject("internvl_qwen3_moe")
    others = {name: value for name, value in it.inputs.items() if name != "input_ids"}
    embeddings = it.model.get_input_embeddings()(it.inputs["input_ids"])
    with it.engine() as engine, engine.using(rule=reference.rule(len(it.blocks), 0.22, 0.3, seed=5)) as counts:
        it.model(**it.inputs)
        expected = counts.kept.clone()
        counts.reset()
        with watching_the_engine(monkeypatch) as seen:
            it.model(inputs_embeds=embeddings, **others)
        assert seen == []
        assert torch.equal(counts.kept, expected)


def test_inference_mode_and_back(emulated: Emulated, qwen: Subject) -> None:
    """What a first forward in inference mode left behind can be written to outside of it."""
    rule, other = (reference.rule(len(qwen.blocks), tau, tau, seed=5) for tau in (0.22, 0.3))
    with qwen.engine() as engine, engine.using(rule=rule) as counts:
        with torch.inference_mode():
            expected, kept = qwen.model(**qwen.inputs).logits, counts.kept.clone()
        counts.reset()
        assert torch.equal(qwen.model(**qwen.inputs).logits, expected)
        assert torch.equal(counts.kept, kept)
        engine.rule = other
        assert not torch.equal(qwen.model(**qwen.inputs).logits, expected)


# -- capturing ------------------------------------------------------------------------------------------------------------


def test_what_has_run_once_can_be_captured(emulated: Emulated, qwen: Subject) -> None:
    with qwen.engine() as engine, engine.using(rule=reference.rule(len(qwen.blocks), 0.22, 0.3, seed=5)) as counts:
        expected = qwen.model(**qwen.inputs).logits
        kept = counts.kept.clone()
        emulated.recording = True
        assert torch.equal(qwen.model(**qwen.inputs).logits, expected)
        emulated.recording = False
        assert torch.equal(counts.kept, 2 * kept)


def test_a_first_forward_cannot_be_captured(emulated: Emulated, qwen: Subject) -> None:
    rule, other = (reference.rule(len(qwen.blocks), 0.22, 0.3, seed=seed) for seed in (5, 6))
    with qwen.engine() as engine, engine.using(rule=rule):
        emulated.recording = True
        with pytest.raises(KernelError, match="while a CUDA graph is being captured on `cpu`") as raised:
            qwen.model(**qwen.inputs)
        assert raised.value.hint == "run the model once before capturing"
        emulated.recording = False
        qwen.model(**qwen.inputs)
        engine.rule, emulated.recording = other, True
        with pytest.raises(KernelError, match="a rule is used for the first time"):
            qwen.model(**qwen.inputs)
        emulated.recording = False


def test_a_comparison_that_is_due_cannot_be_captured(emulated: Emulated, qwen: Subject) -> None:
    with qwen.engine() as engine:
        with engine.using(rule=reference.rule(len(qwen.blocks), 0.0, 0.0)):
            qwen.model(**qwen.inputs)
        rule = reference.rule(len(qwen.blocks), 0.22, 0.3, seed=5)
        placed = engine._place(torch.device("cpu"))
        placed.use(rule)
        with engine.using(rule=rule):
            emulated.recording = True
            with pytest.raises(KernelError, match=f"still to be compared with `{qwen.blocks[0].name}`"):
                qwen.model(**qwen.inputs)
            emulated.recording = False


def test_skipping_by_transformers_cannot_be_captured(emulated: Emulated, qwen: Subject) -> None:
    rule = reference.rule(len(qwen.blocks), 0.22, 0.3, seed=5)
    with qwen.engine(use_operator=False) as engine, engine.using(rule=rule) as counts:
        qwen.model(**qwen.inputs)
        assert 0 < counts.skip_ratio() < 1
        emulated.recording = True
        with pytest.raises(KernelError, match="the operator is switched off"):
            qwen.model(**qwen.inputs)
        emulated.recording = False


class Doubled(Contribution):
    """Twice pi, by code that no device has."""

    key = "doubled"

    def __call__(self, pairs: Pairs) -> torch.Tensor:
        return 2 * pairs.pi


def test_a_rule_that_is_not_decided_on_the_device_cannot_be_captured(emulated: Emulated, qwen: Subject) -> None:
    plain = reference.rule(len(qwen.blocks), 0.22, 0.3, seed=5)
    with qwen.engine() as engine:
        with engine.using(rule=plain) as counts:
            expected, kept = qwen.model(**qwen.inputs).logits, counts.kept.clone()
        with engine.using(rule=replace(plain, tau=2 * plain.tau, contribution=Doubled())) as counts:
            torch.testing.assert_close(qwen.model(**qwen.inputs).logits, expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(counts.kept, kept)
            emulated.recording = True
            with pytest.raises(KernelError, match="a rule that is not decided on the device"):
                qwen.model(**qwen.inputs)
            emulated.recording = False


def test_a_captured_graph_may_use_its_memory_as_long_as_the_engine_lives(emulated: Emulated, qwen: Subject) -> None:
    """Another rule, and counts that are read or reset, change what is in memory and not where it is."""
    rule, other = (reference.rule(len(qwen.blocks), tau, tau, seed=5) for tau in (0.22, 0.3))
    with qwen.engine() as engine, engine.using(rule=rule) as counts:
        qwen.model(**qwen.inputs)
        placed = engine._place(torch.device("cpu"))
        where = [t.data_ptr() for t in (placed.tau, placed.scale(1), placed.kept(1), counts.on(torch.device("cpu")))]
        first = counts.skip_ratio()
        counts.reset()
        with engine.using(rule=other):
            qwen.model(**qwen.inputs)
            assert counts.skip_ratio() > first
        assert where == [t.data_ptr() for t in (placed.tau, placed.scale(1), placed.kept(1), counts.on(torch.device("cpu")))]
        assert placed.tau.tolist() == other.tau.repeat(2).tolist()


# -- what the operator does not do ----------------------------------------------------------------------------------------


def test_without_the_library_transformers_computes(emulated: Emulated, qwen: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = reference.rule(len(qwen.blocks), 0.22, 0.3, seed=5)

    def missing() -> None:
        return libraries.load("libmodes_missing.so")  # type: ignore[return-value]

    monkeypatch.setattr(emulated, "library", missing)
    with qwen.engine() as engine, engine.using(rule=rule) as counts:
        logits, kept = qwen.model(**qwen.inputs).logits, counts.kept.clone()
        assert all("`libmodes_missing.so` is not installed" in found.reason for found in engine.implementations)
        engine.use_operator = False
        counts.reset()
        assert torch.equal(qwen.model(**qwen.inputs).logits, logits)
        assert torch.equal(counts.kept, kept)
        assert 0 < counts.skip_ratio() < 1


def test_a_drop_beside_a_rule(emulated: Emulated, qwen: Subject) -> None:
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


def test_weights_elsewhere_are_left_to_transformers(emulated: Emulated, qwen: Subject) -> None:
    operator_on = qwen.blocks[0]
    with qwen.engine() as engine:
        operator = engine._operators[operator_on.name]
        x, index, weights = torch.randn(2, 64), torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5)
        assert operator(x, index, weights, torch.eye(2) > 0) is not None
        assert operator._experts is not None
        operator._experts.device = torch.device("meta")
        assert operator(x, index, weights, torch.eye(2) > 0) is None
        assert "with the experts' weights on `meta`" in operator.implementation.reason
