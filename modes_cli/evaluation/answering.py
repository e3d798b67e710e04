"""Answering samples in several ways: one reading of the samples, each batch answered in every way.

Stopped, the same command goes on after the last answers that were saved. What a way of answering is called when it is saved is
its number, so the ways must come in the same order.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from modes_cli.data import batches
from modes_cli.data.overlap import sample_digest
from modes_cli.data.sample import Sample, SampleSource
from modes_cli.progress import Progress
from modes_cli.runtime.answers import Answers
from modes_cli.skipping.statistics import PairCounts
from modes_cli.unfinished import State, Unfinished

Way = Callable[[Sequence[Sample]], Answers]


class Side:
    """One way of answering: texts in order, pairs counted, seconds spent in the model."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.seconds = 0.0
        self.counts: PairCounts | None = None

    def add(self, answers: Answers) -> None:
        self.texts += answers.texts
        self.seconds += answers.prefill_seconds + answers.decode_seconds
        if self.counts is None:
            self.counts = PairCounts(answers.counts.layers)
        self.counts.kept += answers.counts.kept
        self.counts.total += answers.counts.total

    @property
    def skip_ratio(self) -> dict[str, float]:
        """Skipped share of all pairs, and of each group's."""
        return {"all": self.counts.skip_ratio(), **self.counts.per_group()} if self.counts else {"all": 0.0}


@dataclass
class Answered:
    """What came of it, in the order of the samples. `digests`: as `overlap` compares them."""

    sides: dict[Hashable, Side]
    tasks: list[str] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def right(self, way: Hashable) -> list[bool]:
        """Which samples one way of answering has right."""
        return [is_right(given, wanted) for given, wanted in zip(self.sides[way].texts, self.wanted, strict=True)]


def answered(
    source: SampleSource,
    ways: Mapping[Hashable, Way],
    batch_size: int,
    progress: Progress,
    unfinished: Unfinished,
    *,
    fresh: bool = False,
) -> Answered:
    """Every sample's answer in every way.

    Args:
        unfinished: where answers are saved, and with which those go on that are there; removing it is the caller's.
        fresh: begin with nothing.
    """
    found = Answered({name: Side() for name in ways})
    before = None if fresh else unfinished.restore()
    done = 0 if before is None else _resume(found, before)
    step = 0
    progress.start("evaluate", len(ways) * len(source))
    for samples in batches(source, batch_size):
        for sample in samples:
            found.tasks.append(sample.task)
            found.wanted.append(sample.answer)
            found.digests.append(sample_digest(sample))
        for name, answer in ways.items():
            step += 1
            if step > done:
                found.sides[name].add(answer(samples))
                if unfinished.due:
                    unfinished.save(_state(found, step))
            progress.advance(len(samples))
    return found


def _state(found: Answered, step: int) -> State:
    """After so many batches in one way."""
    counts = {
        str(number): torch.stack([side.counts.kept, side.counts.total])
        for number, side in enumerate(found.sides.values())
        if side.counts is not None
    }
    return State(step, counts, [[side.texts, side.seconds] for side in found.sides.values()])


def _resume(found: Answered, before: State) -> int:
    for number, (side, (texts, seconds)) in enumerate(zip(found.sides.values(), before.notes, strict=True)):
        side.texts, side.seconds = texts, seconds
        if (counts := before.tensors.get(str(number))) is not None:
            side.counts = PairCounts(counts.shape[2])
            side.counts.kept, side.counts.total = counts
    return before.done


def is_right(given: str, wanted: str) -> bool:
    """Exact match, but for case, surrounding and repeated white space."""
    return " ".join(given.split()).casefold() == " ".join(wanted.split()).casefold()
