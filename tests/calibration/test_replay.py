"""Replaying from a layer on gives the bits of whole forwards, and leaves nothing behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modes_cli.calibration.calibrate import COLUMNS
from modes_cli.calibration.replay import Replay, answer_logits
from modes_cli.data.sample import Sample
from modes_cli.models.blocks import MoEBlock, find_moe_blocks
from modes_cli.models.groups import TokenGroups
from modes_cli.models.inputs import Batch, measuring_batch
from modes_cli.models.loading import Loaded, load
from modes_cli.requests import ModelSpec
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.routing import Drop
from tests.families import FAMILIES, TOKENS

IN_MEMORY = [name for name in FAMILIES if name != "qwen3_vl_moe"]  # that one is `tiny`
Subject = tuple[Any, list[MoEBlock], TokenGroups, Batch]


@cache
def in_memory(family: str) -> Subject:
    model, inputs = FAMILIES[family]()
    answer = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    answer[0, -4:-1] = answer[1, -3:] = True
    return model, find_moe_blocks(model), TOKENS, Batch(inputs, answer)


@pytest.fixture
def subject(
    request: pytest.FixtureRequest, one_thread: None, small_samples: Callable[..., list[Sample]]
) -> Callable[[str], Subject]:
    def of(name: str) -> Subject:
        if name in FAMILIES:
            return in_memory(name)
        loaded: Loaded = request.getfixturevalue(name)
        return (
            loaded.model,
            loaded.blocks,
            loaded.tokens,
            measuring_batch(loaded, small_samples(4, text_only=name == "tiny_text")),
        )

    return of


@contextmanager
def installed(subject: Subject) -> Iterator[tuple[SkipEngine, Replay]]:
    model, blocks, tokens, _ = subject
    engine = SkipEngine(model, blocks, tokens)
    try:
        with Replay(model, blocks) as replay:
            yield engine, replay
    finally:
        engine.remove()


def by_whole_forwards(subject: Subject) -> dict[tuple[int, int | None], Tensor]:
    """Logits without each layer's experts, each from a forward of its own without any replay."""
    model, blocks, tokens, batch = subject
    engine = SkipEngine(model, blocks, tokens)
    found = {}
    try:
        for block in blocks:
            for _, group in COLUMNS:
                with engine.using(drop=Drop(block.index, group)):
                    found[block.index, group] = answer_logits(model, batch)
    finally:
        engine.remove()
    return found


@pytest.fixture(scope="module")
def tiny_text(tiny_text_moe_checkpoint: Path) -> Loaded:
    return load(ModelSpec(str(tiny_text_moe_checkpoint), text_only=True))


@pytest.mark.parametrize("name", ["tiny", "digits", "tiny_text", *IN_MEMORY])
def test_every_layer_and_modality_bit_for_bit(name: str, subject: Callable[[str], Subject]) -> None:
    it = subject(name)
    model, blocks, _, batch = it
    plain, expected = answer_logits(model, batch), by_whole_forwards(it)
    assert not torch.equal(expected[0, None], plain)
    with installed(it) as (engine, replay):
        assert torch.equal(replay.record(batch), plain)
        # Backwards, so that no replay can live off what the one before it left.
        for block in reversed(blocks):
            for _, group in COLUMNS:
                with engine.using(drop=Drop(block.index, group)):
                    assert torch.equal(replay.run(batch, block.layer), expected[block.index, group])
        for block in blocks:
            assert torch.equal(replay.run(batch, block.layer), plain)


def test_a_second_batch_replaces_the_first(digits: Loaded, small_samples: Callable[..., list[Sample]]) -> None:
    samples = small_samples(5)
    with Replay(digits.model, digits.blocks) as replay:
        for batch in (measuring_batch(digits, samples[:2]), measuring_batch(digits, samples[2:])):
            recorded = replay.record(batch)
            assert torch.equal(replay.run(batch, digits.blocks[-1].layer), recorded)


def test_only_the_layers_from_the_start_on_are_run(digits: Loaded, small_samples: Callable[..., list[Sample]]) -> None:
    batch = measuring_batch(digits, small_samples(2))
    ran: list[int] = []
    layers = list(digits.model.model.language_model.layers)
    handles = [layer.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    with Replay(digits.model, digits.blocks) as replay:
        assert replay.layers == len(layers)
        replay.record(batch)
        assert ran == list(range(len(layers)))
        for block in digits.blocks:
            ran.clear()
            before = replay.layers_run
            replay.run(batch, block.layer)
            assert ran == list(range(block.layer, len(layers)))
            assert replay.layers_run - before == len(ran)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["tiny", "digits", *IN_MEMORY])
def test_images_are_encoded_once(name: str, subject: Callable[[str], Subject]) -> None:
    model, blocks, _, batch = subject(name)
    decoder = set(model.get_decoder().modules())
    towers = [
        child for child in model.model.children() if not decoder & set(child.modules()) and not isinstance(child, nn.Linear)
    ]
    outside = [m for tower in towers for m in tower.modules() if isinstance(m, (nn.LayerNorm, nn.Linear, nn.Conv2d, nn.Conv3d))]
    calls = {"count": 0}

    def count(*_: object) -> None:
        calls["count"] += 1

    handles = [module.register_forward_hook(count) for module in outside]
    with Replay(model, blocks) as replay:
        replay.record(batch)
        once = calls["count"]
        assert once > 0
        for block in blocks:
            replay.run(batch, block.layer)
        assert calls["count"] == once
    answer_logits(model, batch)
    assert calls["count"] == 2 * once
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("error", [False, True])
def test_nothing_is_left_behind(error: bool, tiny: Loaded, small_samples: Callable[..., list[Sample]]) -> None:
    batch = measuring_batch(tiny, small_samples(2))
    before, plain = [sorted(module.__dict__) for module in tiny.model.modules()], answer_logits(tiny.model, batch)
    replay = Replay(tiny.model, tiny.blocks)
    try:
        with replay:
            replay.record(batch)
            replay.run(batch, tiny.blocks[0].layer)
            if error:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [sorted(module.__dict__) for module in tiny.model.modules()] == before
    assert not any("forward" in module.__dict__ for module in tiny.model.modules())
    assert torch.equal(answer_logits(tiny.model, batch), plain)
    assert (replay._outputs, replay._encoded) == ([], {})


def test_answer_logits_are_those_of_the_whole_forward_in_reading_order(
    tiny: Loaded, small_samples: Callable[..., list[Sample]]
) -> None:
    batch = measuring_batch(tiny, small_samples(4))
    with torch.no_grad():
        whole = tiny.model(**batch.inputs).logits
    found = answer_logits(tiny.model, batch)
    torch.testing.assert_close(found, whole[batch.answer], atol=1e-5, rtol=1e-5)
    assert found.shape[0] == int(batch.answer.sum())
