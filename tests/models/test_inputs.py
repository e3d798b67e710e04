"""Samples as model inputs: where answers are read, where padding goes."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from modes_cli.data.sample import Sample
from modes_cli.errors import BadData
from modes_cli.models.inputs import end_ids, measuring_batch, prompt_batch
from modes_cli.models.loading import Loaded

Take = Callable[..., list[Sample]]


@pytest.fixture(scope="module")
def samples(small_samples: Take) -> list[Sample]:
    return small_samples(6)


def test_answer_positions_are_those_before_each_answer_token(digits: Loaded, samples: list[Sample]) -> None:
    batch = measuring_batch(digits, samples)
    ids = batch.inputs["input_ids"]
    for row, sample in enumerate(samples):
        positions = batch.answer[row].nonzero(as_tuple=True)[0]
        assert digits.tokenizer.decode(ids[row, positions + 1][:-1]) == sample.answer
        assert int(ids[row, positions[-1] + 1]) == end_ids(digits)[0]
        assert positions.tolist() == list(range(int(positions[0]), int(positions[-1]) + 1))


def test_measuring_pads_on_the_right_and_prompts_on_the_left(digits: Loaded, samples: list[Sample]) -> None:
    for batch, left in ((measuring_batch(digits, samples), False), (prompt_batch(digits, samples), True)):
        mask = batch.inputs["attention_mask"]
        lengths = mask.sum(1)
        assert lengths.min() < lengths.max()  # something is padded
        for row, length in zip(mask, lengths.tolist(), strict=True):
            real = row[-length:] if left else row[:length]
            assert bool(real.all())
        assert set(batch.inputs["input_ids"][mask == 0].tolist()) == {digits.tokenizer.pad_token_id}


def test_a_measured_prompt_is_the_generated_one_plus_the_answer(digits: Loaded, samples: list[Sample]) -> None:
    for sample in samples:
        prompt, whole = prompt_batch(digits, [sample]), measuring_batch(digits, [sample])
        length = prompt.inputs["input_ids"].shape[1]
        assert torch.equal(whole.inputs["input_ids"][:, :length], prompt.inputs["input_ids"])
        assert torch.equal(whole.inputs["pixel_values"], prompt.inputs["pixel_values"])
        assert int(whole.answer.nonzero()[0, 1]) == length - 1
        assert not prompt.answer.any()


def test_logits_do_not_depend_on_the_batch(digits: Loaded, samples: list[Sample]) -> None:
    together = measuring_batch(digits, samples)
    with torch.no_grad():
        all_logits = digits.model(**together.inputs).logits
        for row, sample in enumerate(samples):
            alone = measuring_batch(digits, [sample])
            torch.testing.assert_close(
                all_logits[row][together.answer[row]], digits.model(**alone.inputs).logits[alone.answer], atol=2e-4, rtol=1e-3
            )


def test_a_text_model_gets_text_only(tiny_text_moe_checkpoint: object, small_samples: Take) -> None:
    from modes_cli.models.loading import load
    from modes_cli.requests import ModelSpec

    loaded = load(ModelSpec(str(tiny_text_moe_checkpoint), text_only=True))
    batch = measuring_batch(loaded, small_samples(3, text_only=True))
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_an_empty_answer_is_refused_by_name(digits: Loaded, samples: list[Sample]) -> None:
    with pytest.raises(BadData, match=f"sample `{samples[0].id}`: the answer `` has no tokens"):
        measuring_batch(digits, [dataclasses.replace(samples[0], answer="")])
