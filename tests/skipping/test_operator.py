"""The operator in the engine: wherever it computes what transformers would, and nowhere else."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from modes_cli.errors import KernelError
from modes_cli.models.blocks import find_moe_blocks
from modes_cli.models.groups import VISION
from modes_cli.runtime import libraries
from modes_cli.skipping.operator import BlockOperator
from modes_cli.skipping.routing import Drop
from tests.families import FAMILIES, HIDDEN, TOKENS, TOP_K
from tests.skipping import reference
from tests.skipping.conftest import Subject

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def copied(subject: Subject, dtype: torch.dtype = torch.float32) -> Subject:
    model = copy.deepcopy(subject.model).to(dtype)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in subject.inputs.items()}
    return Subject(model, inputs, find_moe_blocks(model))


def forward(subject: Subject, engine: Any) -> tuple[list[reference.Call], set[str]]:
    """A forward that skips: the experts' calls, and what computed them."""
    rule = reference.rule(len(subject.blocks), 0.22, 0.3, seed=5)
    with reference.listening(subject.blocks) as calls, engine.using(rule=rule) as counts:
        subject.model(**subject.inputs)
        assert 0 < counts.skip_ratio() < 1
    return calls, {found.name for found in engine.implementations}


def assert_left_to_transformers(subject: Subject, why: str, blocks: int | None = None) -> None:
    """The first `blocks` blocks (all) are not the operator's, for that reason, and come out as without it."""
    with subject.engine() as engine, torch.no_grad():
        calls, _ = forward(subject, engine)
        found = engine.implementations[:blocks]
        engine.use_operator = False
        expected, _ = forward(subject, engine)
    assert {it.name for it in found} == {"transformers"}
    assert all(why in it.reason for it in found), found[0].reason
    if blocks is None:
        assert all(torch.equal(a.output, b.output) for a, b in zip(calls, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_dtype(family: str, dtype: torch.dtype, subject: Callable[[str], Subject]) -> None:
    it = copied(subject(family), dtype)
    with it.engine() as engine:
        calls, names = forward(it, engine)
        assert names == {"modes"}
        rule = reference.rule(len(it.blocks), 0.22, 0.3, seed=5)
        group = reference.groups(TOKENS, it.inputs["input_ids"], it.inputs["attention_mask"])
        for call in calls:
            kept = reference.keep(rule, reference.probability(call.weights), call.block.index, group)
            exact = reference.experts_output(call.block, call.hidden, call.index, call.weights, kept)
            error = (call.output.float() - exact).norm() / exact.norm()
            assert float(error) < ROUNDING[dtype]
            assert not call.output[~kept.any(-1)].any()


@torch.no_grad()
def test_the_base_sees_probes_only(qwen: Subject) -> None:
    with reference.counting(qwen.inner) as computed, qwen.engine() as engine:
        assert [it.name for it in engine.implementations] == ["transformers"] * len(qwen.blocks)
        forward(qwen, engine)
        probes = len(computed.rows)
        assert computed.rows == [2 * TOP_K] * probes
        for _ in range(2):
            assert forward(qwen, engine)[1] == {"modes"}
        assert len(computed.rows) == probes


@torch.no_grad()
def test_calls_that_keep_all_pairs_do_not_even_compare(qwen: Subject) -> None:
    with reference.counting(qwen.inner) as computed, qwen.engine() as engine:
        with engine.using(rule=reference.rule(len(qwen.blocks), 0.0, 0.0)):
            qwen.model(**qwen.inputs)
        assert computed.rows == [qwen.inputs["input_ids"].numel() * TOP_K] * len(qwen.blocks)
        assert {it.reason for it in engine.implementations} == {"no pair has been skipped yet"}


@torch.no_grad()
def test_a_drop_without_a_rule_keeps_the_bits_of_the_full_forward(qwen: Subject) -> None:
    group = reference.groups(TOKENS, qwen.inputs["input_ids"], qwen.inputs["attention_mask"])
    last = qwen.blocks[-1].index
    with qwen.engine() as engine, reference.listening(qwen.blocks) as calls:
        qwen.model(**qwen.inputs)
        with engine.using(drop=Drop(last, (VISION,))):
            qwen.model(**qwen.inputs)
    full, dropped = calls[last].output, calls[-1].output
    assert not dropped[group == VISION].any()
    torch.testing.assert_close(dropped[group != VISION], full[group != VISION], atol=1e-6, rtol=1e-6)
    assert {it.name for it in engine.implementations} == {"transformers"}


# -- classes that look alike and compute something else ------------------------------------------------------------------


def clamped(self: Any, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return self.act_fn(gate.clamp(max=16.0)) * up.clamp(-16.0, 16.0)


def swapped(self: Any, both: Tensor) -> Tensor:
    up, gate = both.chunk(2, -1)
    return self.act_fn(gate) * up


def scaled(self: Any, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return self.act_fn(gate) * up * 1.05


def normed(self: Any, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return nn.functional.normalize(self.act_fn(gate) * up, dim=-1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gate", [clamped, swapped, scaled, normed])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_a_gate_that_computes_something_else(implementation: str, gate: Any, dtype: torch.dtype, qwen: Subject) -> None:
    it = copied(qwen, dtype)
    for block in it.blocks:
        block.experts.__class__ = type("Alike", (type(block.experts),), {"_apply_gate": gate})
    with it.implementation(implementation):
        assert_left_to_transformers(it, "`Alike` does not compute what the operator does")


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "step3p7"])
def test_a_forward_that_computes_something_else(family: str, subject: Callable[[str], Subject]) -> None:
    """Experts that multiply the routing weights, as `eager` within transformers' experts interface and outside of it."""
    it = copied(subject(family))
    own: Any = type(it.blocks[0].experts).forward
    plain = getattr(own, "__wrapped__", own)

    class Alike(nn.Module):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return plain(self, hidden_states, top_k_index, top_k_weights * 2)  # type: ignore[no-any-return]

    if family == "step3p7":
        Alike._apply_gate = type(it.blocks[0].experts)._apply_gate  # type: ignore[attr-defined]
    else:
        Alike = use_experts_implementation(Alike)  # type: ignore[misc]
    for block in it.blocks:
        block.experts.__class__ = Alike
    with it.implementation("eager") if family == "qwen3_vl_moe" else contextlib.nullcontext():
        assert_left_to_transformers(it, "`Alike` does not compute what the operator does")


def test_a_clamp_is_believed_without_a_probe_and_block_by_block(subject: Callable[[str], Subject]) -> None:
    """Step-3 clamps in some layers; a limit beyond every probe would not be seen in numbers."""
    it = copied(subject("step3p7"))
    it.blocks[0].experts.limit = 1e5
    assert_left_to_transformers(it, "clamps its activations at `100000.0`", 1)
    with it.engine() as engine, torch.no_grad():
        assert forward(it, engine)[1] == {"modes", "transformers"}


def test_a_parameter_that_the_operator_does_not_know(qwen: Subject) -> None:
    it = copied(qwen)
    for block in it.blocks:
        block.experts.scale = nn.Parameter(torch.ones(HIDDEN), requires_grad=False)
    assert_left_to_transformers(it, "more than the weights the operator knows: scale")


def test_an_output_of_zero_proves_nothing(qwen: Subject) -> None:
    it = copied(qwen)
    for block in it.blocks:
        block.experts.down_proj.data.zero_()
    assert_left_to_transformers(it, "differ by nan")


# -- calls and weights that are not for the operator ---------------------------------------------------------------------


def test_gradients(qwen: Subject) -> None:
    it = copied(qwen)
    it.model.requires_grad_(True)
    with it.engine() as engine, engine.using(rule=reference.rule(len(it.blocks), 0.22, 0.3, seed=5)):
        it.model.train()
        it.model(**it.inputs).logits.sum().backward()
        assert all("torch.no_grad" in found.reason for found in engine.implementations)
        assert all(block.experts.down_proj.grad.any() for block in it.blocks)
        with torch.no_grad():
            it.model(**it.inputs)
        assert {found.name for found in engine.implementations} == {"modes"}


def test_autocast(qwen: Subject) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_left_to_transformers(qwen, "autocast")


@torch.no_grad()
def test_defaults_of_torch_do_not_matter(qwen: Subject) -> None:
    block, before = qwen.blocks[0], torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            operator = BlockOperator(block, block.experts.forward)
            x, index = torch.randn(3, HIDDEN, dtype=torch.float32, device="cpu"), torch.arange(6, device="cpu").reshape(3, 2)
            weights, keep = torch.ones(3, 2, dtype=torch.float32, device="cpu"), torch.eye(3, 2, device="cpu") > 0
            assert operator(x, index, weights, keep) is not None, operator.implementation.reason
    finally:
        torch.set_default_dtype(before)


def test_an_installation_without_the_library(qwen: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str = libraries.CPU) -> None:
        raise KernelError("the operator library is not installed")

    monkeypatch.setattr(libraries, "load", missing)
    assert_left_to_transformers(qwen, "the operator library is not installed")


def test_a_part_of_the_experts(qwen: Subject) -> None:
    it = copied(qwen)
    for block in it.blocks:
        block.experts._is_expert_parallel = True
    assert_left_to_transformers(it, "a part of the experts")


def test_weights_that_are_not_contiguous(qwen: Subject) -> None:
    it = copied(qwen)
    for block in it.blocks:
        block.experts.down_proj.data = block.experts.down_proj.data.mT.contiguous().mT
    assert_left_to_transformers(it, "down is not contiguous")


@torch.no_grad()
def test_weights_that_are_replaced(qwen: Subject) -> None:
    """Other memory, another dtype, gone for a while (offloaded): each forward computes with the weights of its time."""
    it = copied(qwen)
    block = it.blocks[0]
    base = it.blocks[0].experts.forward
    experts = BlockOperator(block, base)
    x, index, weights = torch.randn(3, HIDDEN), torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.full((3, 2), 0.5)
    keep = torch.tensor([[True, False], [True, True], [False, True]])

    def right() -> bool:
        out = experts(x, index, weights, keep)
        if out is None:
            return False
        expected = reference.experts_output(block, x, index, weights, keep)
        return bool(torch.allclose(out.float(), expected, atol=ROUNDING[x.dtype] * 10))

    assert right()
    block.experts.down_proj.mul_(2)  # in place
    assert right()
    block.experts.to(torch.bfloat16)
    assert experts(x, index, weights, keep) is None
    assert "another dtype" in experts.implementation.reason
    x, weights = x.bfloat16(), weights.bfloat16()
    assert right()
    stored = block.experts.down_proj
    block.experts.down_proj = nn.Parameter(stored.to("meta"), requires_grad=False)
    assert experts(x, index, weights, keep) is None
    assert "meta" in experts.implementation.reason
    block.experts.down_proj = nn.Parameter(stored * 3, requires_grad=False)
    assert right()
    again = copy.deepcopy(experts)
    assert torch.equal(again(x, index, weights, keep), experts(x, index, weights, keep))  # type: ignore[arg-type]
