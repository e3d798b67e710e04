"""Questions that differ in everything, for comparing what two runtimes generate."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from modes_cli.data.sample import Sample
from modes_cli.models.inputs import end_ids, prompt_batch
from modes_cli.models.loading import Loaded
from tests.runtime.test_session import picture, sample

QUESTIONS = ("How many digits?", "Add?", "What is at the top left?", "Is there a 7 in the middle row?", "Read the top row.")
SIDES = (24, 32, 40, 48, 64)
BATCH = 6


def varied(count: int) -> list[Sample]:
    """Pictures of many shapes, now and then two of them; every sixth question has none."""
    random, made = np.random.default_rng(0), []
    for number in range(count):
        shown = (0, 1, 1, 2, 1, 1)[number % 6]
        pictures = [picture(*random.choice(SIDES, 2).tolist(), seed=100 * number + i) for i in range(shown)]
        made.append(sample(f"{number}: {QUESTIONS[number % len(QUESTIONS)]}", *pictures))
    return made


def batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """With padding on the left; pictures in all of a batch, or in none."""
    for group in ([s for s in samples if s.images], [s for s in samples if not s.images]):
        for start in range(0, len(group), BATCH):
            yield group[start : start + BATCH]


def generated(loaded: Loaded, samples: Sequence[Sample], steps: int) -> list[list[int]]:
    """Greedy tokens of transformers' own loop, up to the end token."""
    model: PreTrainedModel = loaded.model
    inputs, ends = prompt_batch(loaded, samples).inputs, end_ids(loaded)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=steps, do_sample=False)  # type: ignore[operator]
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]
