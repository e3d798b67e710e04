"""Saliency against plain automatic differentiation, and what is left out where a model has none."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modes_cli.calibration import calibrate, linear
from modes_cli.calibration.contributions import OutputSums
from modes_cli.calibration.replay import Replay, answer_logits
from modes_cli.calibration.saliency import NAMES, SUMS, SaliencySums
from modes_cli.data.sample import Sample
from modes_cli.errors import BadArtifact
from modes_cli.models.groups import DECODE, SKIPPABLE, TEXT
from modes_cli.models.inputs import Batch, measuring_batch
from modes_cli.models.loading import Loaded
from modes_cli.run_folder import RunFolder
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.registry import policy
from tests.families import FAMILIES, TOKENS
from tests.runs import calibration_request
from tests.skipping.conftest import make

MODULE = importlib.import_module("modes_cli.calibration.saliency")


@pytest.fixture(scope="module")
def batch(tiny: Loaded, small_samples: Callable[..., list[Sample]]) -> Batch:
    return measuring_batch(tiny, small_samples(5))


def measured(model: Any, blocks: Any, tokens: Any, batch: Batch, number: int = 0) -> tuple[SaliencySums, dict[str, Tensor]]:
    sums = SaliencySums(blocks, OutputSums(model, blocks).routers, "")
    engine = SkipEngine(model, blocks, tokens)
    try:
        with Replay(model, blocks) as replay, engine.answers_at(batch.decoding):
            replay.record(batch)
            found = sums.measure(number, batch, engine, replay)
    finally:
        engine.remove()
    return sums, found


def differentiated(loaded: Loaded, batch: Batch, number: int) -> list[tuple[Tensor, Tensor]]:
    """By layer, what the experts are given and the norm of m's gradient at what they return: whole graphs, nothing replayed."""
    given, outputs, hooks = {}, {}, []
    for block in loaded.blocks:

        def hook(_: Any, args: Any, out: Tensor, layer: int = block.index) -> Tensor:
            given[layer], outputs[layer] = args[0].detach(), out.detach().requires_grad_()
            return outputs[layer] if layer == 0 else out + (outputs[layer] - out.detach())

        hooks.append(block.experts.register_forward_hook(hook))
    try:
        with torch.enable_grad():
            logits = loaded.model(**batch.inputs, use_cache=False).logits[batch.answer]
            signs = torch.randint(0, 2, (len(logits),), generator=torch.Generator().manual_seed(number)) * 2 - 1
            best, next_best = logits.topk(2, -1).values.unbind(-1)
            total = (signs * (best - next_best).log()).sum()
            gradients = torch.autograd.grad(total, [outputs[block.index] for block in loaded.blocks])
    finally:
        for one in hooks:
            one.remove()
    return [(given[at].reshape(-1, given[at].shape[-1]), g.norm(dim=-1).reshape(-1)) for at, g in enumerate(gradients)]


def test_sums_are_those_of_plain_differentiation(tiny: Loaded, batch: Batch) -> None:
    sums, found = measured(tiny.model, tiny.blocks, tiny.tokens, batch, number=3)
    group = tiny.tokens.of(batch.inputs["input_ids"])
    group = group.masked_fill((group == TEXT) & batch.decoding, DECODE).reshape(-1)
    real = batch.inputs["attention_mask"].bool().reshape(-1)
    for layer, (hidden, saliency) in enumerate(differentiated(tiny, batch, 3)):
        for cell in range(len(SKIPPABLE)):
            mine = (group == cell) & real
            alive = mine & (saliency > 0)
            expected = torch.zeros(linear.width(hidden.shape[1]), dtype=torch.float64)
            linear.add_tokens(expected, hidden[alive], saliency[alive].log())
            torch.testing.assert_close(found[SUMS[0]][layer, cell], expected, rtol=1e-3, atol=1e-3)
            assert int(found[SUMS[1]][layer, cell]) == int((mine & ~alive).sum())
    assert sums.obstacle == ""
    last = tiny.blocks[-1].index
    assert found[SUMS[1]][last, TEXT] > 0  # on what the last layer does for a prompt's earlier tokens nothing depends
    assert not found[SUMS[0]][last, TEXT].any()


def test_the_model_is_as_it_was(tiny: Loaded, batch: Batch) -> None:
    before, taking = answer_logits(tiny.model, batch), [p.requires_grad for p in tiny.model.parameters()]
    measured(tiny.model, tiny.blocks, tiny.tokens, batch)
    assert torch.equal(answer_logits(tiny.model, batch), before)
    assert [p.requires_grad for p in tiny.model.parameters()] == taking
    assert all(p.grad is None for p in tiny.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_differentiated(family: str) -> None:
    subject = make(family)
    ids = subject.inputs["input_ids"]
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, -3:-1] = True
    inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids), **subject.inputs}
    sums, found = measured(subject.model, subject.blocks, TOKENS, Batch(inputs, answer))
    assert sums.obstacle == ""
    counted = found[SUMS[0]][:, :, -3].sum(1) + found[SUMS[1]].sum(1)
    assert len(set(counted.tolist())) == 1  # every layer has seen every token that is not special
    assert bool((found[SUMS[0]][0, TEXT] != 0).any())


def test_directions_stand_for_a_wide_hidden_size(tiny: Loaded, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "WIDEST", 24)
    sums, found = measured(tiny.model, tiny.blocks, tiny.tokens, batch)
    sums.add(0, found)
    routers = torch.stack([router.weight.detach() for router in OutputSums(tiny.model, tiny.blocks).routers if router])
    made = sums.tensors(routers)
    hidden = tiny.blocks[0].hidden_size
    basis = sums._basis(0, routers)
    assert basis.shape == (24, hidden)
    assert torch.equal(basis[: routers.shape[1]], routers[0])
    # The prediction lies in the span of the directions.
    slopes = made["saliency"][0, TEXT, :-1].double()
    coordinates = torch.linalg.lstsq(basis.double().T, slopes[:, None]).solution
    torch.testing.assert_close((basis.double().T @ coordinates)[:, 0], slopes, rtol=1e-4, atol=1e-6)


def test_a_model_that_cannot_be_differentiated_is_calibrated_without(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

    monkeypatch.setattr(MODULE, "_signed_log_margin", lambda logits, _: Kernel.apply(logits).sum())  # type: ignore[no-untyped-call]
    request = calibration_request(tiny_checkpoint, tmp_path / "run", samples=3, batch_size=2)
    artifact = calibrate(request).artifact
    found = Measured(artifact, RunFolder(tmp_path / "run"))
    assert not load_file(found.path).keys() & set(NAMES)
    with pytest.raises(BadArtifact, match="cannot be differentiated: You must implement"):
        policy("salient").rule(found, {})
    policy("predicted").rule(found, {})


def test_memory_that_runs_out_is_not_an_obstacle_but_an_error(
    tiny: Loaded, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(MODULE, "_signed_log_margin", full)
    with pytest.raises(torch.OutOfMemoryError):
        measured(tiny.model, tiny.blocks, tiny.tokens, batch)
