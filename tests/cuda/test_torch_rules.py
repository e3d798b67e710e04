"""Rules with a scale per expert or a formula in the place of pi, in a model on a GPU: decided there, by the same numbers.

As in test_torch_engine.py, CPU tensors are treated as a GPU's.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modes_cli.errors import KernelError
from modes_cli.models.groups import GROUPS
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.formula import Formula
from modes_cli.skipping.placed import placeable
from modes_cli.skipping.policies.diep import DissimilarRatio
from modes_cli.skipping.policies.mcmoe import ProtectedRatio
from modes_cli.skipping.policies.naee import Ratio
from modes_cli.skipping.policies.predicted import PredictedNorm
from modes_cli.skipping.policies.random import Hashed
from modes_cli.skipping.policies.salient import SalientNorm
from modes_cli.skipping.policies.topk import Rank
from modes_cli.skipping.policies.topp import RemainingMass
from modes_cli.skipping.policy import Rule, tau_vector
from modes_cli.skipping.statistics import PairCounts
from tests.cuda.as_gpu import Emulated, install, watching_the_engine
from tests.families import TOKENS
from tests.skipping import reference
from tests.skipping.conftest import Subject, make

CPU = torch.device("cpu")
NEW = 2


@pytest.fixture
def emulated(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return install(emulated_library, monkeypatch)


@pytest.fixture(scope="module")
def qwen(one_thread: None) -> Subject:
    return make("qwen3_vl_moe")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def formula(kind: type[Formula], it: Subject, seed: int) -> Formula:
    """With made-up tensors of the model's sizes."""
    block, layers = it.blocks[0], len(it.blocks)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(layers, *shape, generator=generator)

    E, H, k = block.num_experts, block.hidden_size, block.top_k
    predictor = {
        "router": random(E, H) - 0.5,
        "router_bias": random(E),
        "coefficients": 0.3 * (random(E, E + 2) - 0.5),
        "range": torch.tensor([-2.0, 1.0]).expand(layers, 2),
    }
    believed = torch.tensor([-1.0, 1.0]).expand(layers, len(GROUPS), 2)
    tensors = {
        Ratio: {"share": random(k)},
        ProtectedRatio: {"share": random(k)},
        DissimilarRatio: {"share": random(k), "apart": random(E, E)},
        PredictedNorm: predictor,
        SalientNorm: {**predictor, "saliency": 0.2 * (random(len(GROUPS), H + 1) - 0.5), "saliency_range": believed},
    }
    parameters = {SalientNorm: {"power": 0.7}, Hashed: {"seed": 3.0}, ProtectedRatio: {"protected": 0.02}}
    return kind(tensors.get(kind, {}), parameters.get(kind, {}))


def rule(it: Subject, kind: type[Formula] | None, tau: float, seed: int = 5, *, per_expert: bool = False) -> Rule:
    shape = (len(it.blocks), len(GROUPS), *((it.blocks[0].num_experts,) if per_expert else ()))
    scale = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    made = None if kind is None else formula(kind, it, seed)
    return Rule(scale, tau_vector({"text": tau, "vision": 1.2 * tau, "decode": 0.8 * tau}), made)


# What a rule is made of, and thresholds that skip some pairs.
RULES: dict[str, Callable[[Subject], Rule]] = {
    "per expert": lambda it: rule(it, None, 0.22, per_expert=True),
    "per expert, with a formula": lambda it: rule(it, RemainingMass, 0.3, per_expert=True),
    "topp": lambda it: rule(it, RemainingMass, 0.3),
    "naee": lambda it: rule(it, Ratio, 0.2),
    "diep": lambda it: rule(it, DissimilarRatio, 0.2),
    "predicted": lambda it: rule(it, PredictedNorm, 0.05),
    "salient": lambda it: rule(it, SalientNorm, 0.007),
    "topk": lambda it: rule(it, Rank, 0.5),
    "random": lambda it: rule(it, Hashed, 0.5),
}


def generate(it: Subject, engine: SkipEngine, rule: Rule) -> tuple[list[reference.Call], Tensor, PairCounts]:
    with reference.listening(it.blocks) as calls, engine.using(rule=rule) as counts:
        ids = it.model.generate(**it.inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return calls, ids[:, :-1], counts


@pytest.mark.parametrize("name", RULES)
def test_exactly_the_pairs_of_the_rule(name: str, emulated: Emulated, qwen: Subject) -> None:
    chosen, layers = RULES[name](qwen), len(qwen.blocks)
    with qwen.engine() as engine:
        calls, ids, counts = generate(qwen, engine, chosen)
        assert {found.name for found in engine.implementations} == {"modes"}
    assert emulated.calls >= NEW * layers
    prompt, mask = qwen.inputs["input_ids"].shape[1], qwen.inputs["attention_mask"]
    kept, total = torch.zeros_like(counts.kept), torch.zeros_like(counts.total)
    for number, call in enumerate(calls):
        step, layer = number // layers, call.block.index
        fed = ids[:, :prompt] if step == 0 else ids[:, prompt + step - 1 : prompt + step]
        real = mask.bool().reshape(-1) if step == 0 else torch.ones(fed.numel(), dtype=torch.bool)
        group = reference.groups(TOKENS, fed, mask if step == 0 else None)
        pairs = chosen.keep(reference.probability(call.weights), layer, group, call.index, call.hidden)
        expected = reference.experts_output(call.block, call.hidden, call.index, call.weights, pairs)
        torch.testing.assert_close(call.output[real], expected[real], atol=2e-5, rtol=1e-4)
        for g in range(len(GROUPS)):
            kept[int(step > 0), layer, g] += int(pairs[real & (group == g)].sum())
            total[int(step > 0), layer, g] += pairs.shape[1] * int((real & (group == g)).sum())
    assert torch.equal(counts.kept, kept)
    assert torch.equal(counts.total, total)
    assert 0.05 < counts.skip_ratio() < 0.95


@pytest.mark.parametrize("name", RULES)
def test_after_the_first_forward_nothing_waits_and_all_can_be_captured(
    name: str, emulated: Emulated, qwen: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    with qwen.engine() as engine, engine.using(rule=RULES[name](qwen)) as counts:
        expected = qwen.model(**qwen.inputs).logits
        kept, launched = counts.kept.clone(), emulated.calls
        emulated.recording = True
        with watching_the_engine(monkeypatch) as seen:
            assert torch.equal(qwen.model(**qwen.inputs).logits, expected)
        emulated.recording = False
        assert seen == []
        assert emulated.calls == launched + len(qwen.blocks)
        assert torch.equal(counts.kept, 2 * kept)


@pytest.mark.parametrize(("kind", "per_expert"), [(None, True), (PredictedNorm, False), (DissimilarRatio, True)])
def test_rules_of_one_kind_replace_each_other_in_place(
    kind: type[Formula] | None, per_expert: bool, emulated: Emulated, qwen: Subject
) -> None:
    """A captured forward reads the other rule's numbers from where the first one's were."""
    first, other = (rule(qwen, kind, 0.1, seed, per_expert=per_expert) for seed in (5, 6))
    with qwen.engine() as engine, engine.using(rule=other) as counts:
        qwen.model(**qwen.inputs)
        wanted = counts.kept.clone()
    with qwen.engine() as engine, engine.using(rule=first) as counts:
        qwen.model(**qwen.inputs)
        assert not torch.equal(counts.kept, wanted)
        placed = engine._place(CPU)
        where = _addresses(placed._in_use[0])
        engine.hand_over(other, CPU)
        assert _addresses(placed._in_use[0]) == where
        counts.reset()
        engine.rule = other
        emulated.recording = True  # nothing is left to be prepared
        qwen.model(**qwen.inputs)
        emulated.recording = False
        assert torch.equal(counts.kept, wanted)


def test_a_captured_forward_cannot_follow_a_rule_of_another_kind(emulated: Emulated, qwen: Subject) -> None:
    one = rule(qwen, RemainingMass, 0.3)
    others = [rule(qwen, None, 0.3), rule(qwen, Ratio, 0.3), rule(qwen, RemainingMass, 0.3, per_expert=True)]
    with qwen.engine() as engine:
        engine.hand_over(one, CPU)
        for other in others:
            with pytest.raises(KernelError, match="cannot follow") as raised:
                engine.hand_over(other, CPU)
            assert raised.value.hint == "capture it again with that rule"
        with engine.using(rule=others[0]) as counts:  # a forward of its own takes it
            qwen.model(**qwen.inputs)
            assert 0 < counts.skip_ratio() < 1


def test_what_a_device_cannot_decide_by_itself(emulated: Emulated, qwen: Subject) -> None:
    assert [placeable(rule(qwen, kind, 0.22)) for kind in (None, Ratio, ProtectedRatio)] == [True, True, False]
    with qwen.engine() as engine, engine.using(rule=rule(qwen, ProtectedRatio, 0.22)) as counts:
        qwen.model(**qwen.inputs)  # reads the device
        assert 0 < counts.skip_ratio() < 1
        emulated.recording = True
        with pytest.raises(KernelError, match="a rule that is not decided on the device"):
            qwen.model(**qwen.inputs)
        emulated.recording = False


def _addresses(numbers: object) -> list[int]:
    scale, tensors = numbers._scale, numbers._tensors  # type: ignore[attr-defined]
    return [scale.data_ptr(), *(tensor.data_ptr() for tensor in tensors.values())]
