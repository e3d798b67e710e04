"""Installing an engine, and giving the model back as it was."""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modes_cli.errors import ModesError
from modes_cli.models.blocks import find_moe_blocks
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.interface import IMPLEMENTATION
from modes_cli.skipping.routing import Drop
from tests.families import FAMILIES, TOKENS
from tests.skipping import reference
from tests.skipping.conftest import Subject


def state(model: Any) -> list[object]:
    """What an engine could leave behind: hooks, attributes, configured implementations."""
    configured = [
        getattr(module.config, "_experts_implementation", None) for module in model.modules() if hasattr(module, "config")
    ]
    return [
        configured,
        *[(sorted(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()],
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removing_restores_the_model(family: str, subject: Callable[[str], Subject]) -> None:
    it = subject(family)
    before, logits = state(it.model), it.model(**it.inputs).logits
    engine = SkipEngine(it.model, it.blocks, TOKENS)
    engine.rule = reference.rule(len(it.blocks), math.inf, math.inf)
    assert state(it.model) != before
    assert not torch.equal(it.model(**it.inputs).logits, logits)
    engine.remove()
    assert state(it.model) == before
    assert torch.equal(it.model(**it.inputs).logits, logits)
    engine.remove()  # twice does no harm
    assert state(it.model) == before


@torch.no_grad()
def test_a_second_engine_is_refused_and_leaves_no_trace(qwen: Subject) -> None:
    before = state(qwen.model)
    with qwen.engine() as first:
        installed = state(qwen.model)
        with pytest.raises(ModesError, match=r"already being skipped by another engine"):
            SkipEngine(qwen.model, qwen.blocks, TOKENS)
        assert state(qwen.model) == installed
        with first.using(rule=reference.rule(len(qwen.blocks), math.inf, math.inf)) as counts:
            qwen.model(**qwen.inputs)
            assert 0 < counts.skip_ratio() < 1
    assert state(qwen.model) == before
    with qwen.engine():  # and after removal there is room again
        assert qwen.inner.config._experts_implementation == IMPLEMENTATION


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_implementation_that_was_set_comes_back(implementation: str, qwen: Subject) -> None:
    with qwen.implementation(implementation):
        with qwen.engine():
            assert qwen.inner.config._experts_implementation == IMPLEMENTATION
        assert qwen.inner.config._experts_implementation == implementation


def test_using_restores_what_was_in_force_also_after_an_error(qwen: Subject) -> None:
    rule, other = reference.rule(3, 0.1, 0.1), reference.rule(3, 0.2, 0.2)
    with qwen.engine() as engine:
        engine.rule = rule
        with contextlib.suppress(ZeroDivisionError), engine.using(rule=other, drop=Drop(0), watch=lambda _: None):
            assert (engine.rule, engine.drop) == (other, Drop(0))
            raise ZeroDivisionError
        assert (engine.rule, engine.drop, engine.watch) == (rule, None, None)


@torch.no_grad()
def test_using_starts_counting_anew(qwen: Subject) -> None:
    rule = reference.rule(len(qwen.blocks), 0.2, 0.2)
    with qwen.engine() as engine:
        totals = []
        for _ in range(2):
            with engine.using(rule=rule) as counts:
                qwen.model(**qwen.inputs)
                totals.append(counts.total.clone())
        assert torch.equal(*totals)


@torch.no_grad()
def test_a_model_set_to_modes_without_an_engine_is_an_error(qwen: Subject) -> None:
    model = copy.deepcopy(qwen.model)
    model.set_experts_implementation(IMPLEMENTATION)
    with pytest.raises(ModesError, match="no engine is installed"):
        model(**qwen.inputs)


@torch.no_grad()
def test_experts_that_see_other_tokens_are_an_error(qwen: Subject) -> None:
    with qwen.engine() as engine, engine.using(rule=reference.rule(len(qwen.blocks), 0.2, 0.2)):
        qwen.model(**qwen.inputs)
        with pytest.raises(ModesError, match="the experts see 3 tokens"):
            qwen.blocks[0].experts(torch.zeros(3, 64), torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 4))


def test_calling_without_tokens_is_an_error(qwen: Subject) -> None:
    with qwen.engine(), pytest.raises(ModesError, match="without input_ids"):
        qwen.model(pixel_values=qwen.inputs["pixel_values"])


def test_a_copy_of_a_model_is_independent(qwen: Subject) -> None:
    """Blocks are found anew in a copy; nothing refers back to the first model."""
    model = copy.deepcopy(qwen.model)
    with qwen.engine():
        engine = SkipEngine(model, find_moe_blocks(model), TOKENS)
        engine.remove()
        assert qwen.inner.config._experts_implementation == IMPLEMENTATION
