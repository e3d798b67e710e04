"""The score histogram: bins hold what they say, and adding in any order gives the same."""

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given

from modes_cli.calibration.scores import BINS, ScoreHistogram, bin_edges, bin_of
from modes_cli.models.groups import GROUPS

SMALLEST = 2.0**-24
scores = st.floats(SMALLEST, 1.0, width=32)


@given(values=st.lists(scores, min_size=1, max_size=50))
def test_bins_bracket_their_values(values: list[float]) -> None:
    edges = bin_edges()
    for value, number in zip(values, bin_of(torch.tensor(values)).tolist(), strict=True):
        assert edges[number] <= value < edges[number + 1]


def test_edges_rise_by_at_most_a_fifth_of_a_percent_and_reach_from_the_smallest_to_one() -> None:
    edges = bin_edges()
    assert edges.shape == (BINS + 1,)
    assert edges[0] == SMALLEST
    assert edges[BINS - 1] == 1.0
    ratios = edges[1:] / edges[:-1]
    assert ratios.min() > 1
    assert ratios.max() <= 1 + 1 / 512


def test_every_edge_begins_its_bin() -> None:
    edges = bin_edges()[:-1].astype(np.float32)
    assert torch.equal(bin_of(torch.from_numpy(edges)), torch.arange(BINS))
    below = np.nextafter(edges[1:], np.float32(0))
    assert torch.equal(bin_of(torch.from_numpy(below)), torch.arange(BINS - 1))


def test_values_outside_go_to_the_outermost_bins() -> None:
    values = torch.tensor([0.0, 1e-30, SMALLEST / 2, 1.0, 1.0000001, 1.5])
    assert bin_of(values).tolist() == [0, 0, 0, BINS - 1, BINS - 1, BINS - 1]


def test_strided_scores_are_read_as_they_are() -> None:
    pi = torch.rand(6, 8)[:, ::2]
    assert torch.equal(bin_of(pi), bin_of(pi.clone()))


Batch = tuple[int, torch.Tensor, torch.Tensor]


def random_batches(seed: int, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        tokens = int(torch.randint(0, 12, (1,), generator=generator))
        pi = torch.rand(tokens, 4, generator=generator).softmax(-1)
        group = torch.randint(0, len(GROUPS), (tokens,), generator=generator, dtype=torch.int32)
        made.append((int(torch.randint(0, 3, (1,), generator=generator)), pi, group))
    return made


def histogram(batches: list[Batch]) -> torch.Tensor:
    made = ScoreHistogram(layers=3)
    for layer, pi, group in batches:
        made.add(layer, pi, group)
    return made.counts


@given(seed=st.integers(0, 2**31), order=st.permutations(range(5)), split=st.integers(0, 5))
def test_order_and_division_into_processes_do_not_matter(seed: int, order: list[int], split: int) -> None:
    batches = random_batches(seed, 5)
    whole = histogram(batches)
    assert torch.equal(histogram([batches[i] for i in order]), whole)
    assert torch.equal(histogram(batches[:split]) + histogram(batches[split:]), whole)


@given(seed=st.integers(0, 2**31))
def test_counts_are_those_of_single_pairs(seed: int) -> None:
    batches = random_batches(seed, 3)
    expected = torch.zeros(3, len(GROUPS), BINS, dtype=torch.int64)
    for layer, pi, group in batches:
        for row, g in zip(pi, group.tolist(), strict=True):
            for number in bin_of(row).tolist():
                expected[layer, g, number] += 1
    assert torch.equal(histogram(batches), expected)
