"""Counting kept and skipped pairs."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from modes_cli.models.groups import AUDIO, DECODE, GROUPS, SPECIAL, TEXT, VISION
from modes_cli.skipping.statistics import PHASES, PairCounts

tokens = st.lists(st.tuples(st.integers(0, len(GROUPS) - 1), st.integers(0, 4)), max_size=9)
calls = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), tokens), max_size=6)


@given(calls=calls)
def test_counts_are_sums_over_calls_by_phase_layer_and_group(calls: list[tuple[int, int, list[tuple[int, int]]]]) -> None:
    counts = PairCounts(layers=3)
    kept, total = (torch.zeros(len(PHASES), 3, len(GROUPS), dtype=torch.int64) for _ in range(2))
    for phase, layer, tokens in calls:
        group, per_token = (torch.tensor([token[i] for token in tokens], dtype=torch.int64) for i in range(2))
        counts.add(phase, layer, group, per_token, top_k=4)
        for g, n in tokens:
            kept[phase, layer, g] += n
            total[phase, layer, g] += 4
    assert torch.equal(counts.kept, kept)
    assert torch.equal(counts.total, total)
    assert counts.skip_ratio() == pytest.approx(1 - int(kept.sum()) / int(total.sum()) if int(total.sum()) else 0.0)


def test_ratios() -> None:
    counts = PairCounts(layers=2)
    group = torch.tensor([TEXT, TEXT, VISION, SPECIAL])
    counts.add(0, 0, group, torch.tensor([4, 2, 1, 4]), top_k=4)
    counts.add(1, 1, group[:1], torch.tensor([0]), top_k=4)
    assert counts.per_group() == {"text": 0.5, "vision": 0.75}  # special is not listed ...
    assert counts.skip_ratio() == 1 - 11 / 20  # ... but counted
    assert counts.per_layer() == [{"all": 1 - 11 / 16, "text": 0.25, "vision": 0.75}, {"all": 1.0, "text": 1.0}]
    counts.add(1, 0, torch.tensor([DECODE, AUDIO]), torch.tensor([1, 4]), top_k=4)
    assert counts.per_group() == {"text": 0.5, "vision": 0.75, "decode": 0.75, "audio": 0.0}


def test_a_group_without_tokens_is_left_out_and_nothing_is_no_skipping() -> None:
    counts = PairCounts(layers=1)
    assert (counts.skip_ratio(), counts.per_group(), counts.per_layer()) == (0.0, {}, [{"all": 0.0}])
    counts.add(0, 0, torch.tensor([0]), torch.tensor([1]), top_k=2)
    assert counts.per_group() == {"text": 0.5}


def test_reset_forgets() -> None:
    counts = PairCounts(layers=1)
    counts.add(0, 0, torch.tensor([0]), torch.tensor([1]), top_k=2)
    counts.reset()
    assert int(counts.total.sum()) == int(counts.kept.sum()) == 0
    assert counts.total.shape == (len(PHASES), 1, len(GROUPS))


def test_what_was_counted_on_a_device_is_added_when_it_is_read_and_forgotten_at_a_reset() -> None:
    counts = PairCounts(layers=1)
    counts.add(0, 0, torch.tensor([0]), torch.tensor([1]), top_k=2)
    there = counts.on(torch.device("cpu"))
    for _ in range(2):
        there[0, 0, 0, 0] += 3
        there[1, 0, 0, 0] += 4
        assert counts.on(torch.device("cpu")) is there
    assert int(counts.kept[0, 0, 0]) == 7
    assert int(counts.total[0, 0, 0]) == 10
    assert int(there.sum()) == 0
    there += 1
    counts.reset()
    assert int(counts.total.sum()) == int(counts.kept.sum()) == int(there.sum()) == 0


def test_counts_can_be_set() -> None:
    counts, other = PairCounts(layers=2), PairCounts(layers=2)
    counts.add(1, 1, torch.tensor([1]), torch.tensor([2]), top_k=4)
    other.kept, other.total = counts.kept.clone(), counts.total.clone()
    other.kept += counts.kept
    assert int(other.kept[1, 1, 1]) == 4
    assert int(counts.kept[1, 1, 1]) == 2
    assert int(other.total.sum()) == 4
