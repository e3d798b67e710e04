"""Medians of pi_j / pi_1 against numpy's."""

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings

from modes_cli.calibration.ratios import SlotRatios
from modes_cli.skipping.policy import routing_probability


def random_pi(seed: int, tokens: int, top_k: int) -> torch.Tensor:
    return routing_probability(torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(seed)) + 0.01)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 60), top_k=st.integers(1, 8))
def test_medians_within_a_bin(seed: int, tokens: int, top_k: int) -> None:
    pi = random_pi(seed, tokens, top_k)
    ratios = SlotRatios(2, top_k)
    ratios.add(1, pi)
    found = ratios.medians()[1].numpy()
    ordered = np.sort(pi.numpy(), 1)[:, ::-1]
    expected = np.quantile(ordered / ordered[:, :1], 0.5, axis=0, method="lower")
    np.testing.assert_allclose(found, expected, rtol=2.1e-3)
    assert found[0] == 1.0


def test_parts_give_the_counts_of_the_whole_in_any_order() -> None:
    pi = random_pi(3, 50, 4)
    whole, parts = SlotRatios(1, 4), SlotRatios(1, 4)
    whole.add(0, pi)
    for rows in (pi[30:], pi[:0], pi[:30]):
        parts.add(0, rows)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.sum(-1).tolist() == [[50] * 4]
