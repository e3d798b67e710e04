"""Linear prediction from sums: against least squares by numpy, and what the two halves decide."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from modes_cli.calibration import linear

D = 6


def data(seed: int, tokens: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Features of very different sizes (tokens, D), one of them constant, and a target that depends on them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, D, generator=generator) * torch.tensor([1.0, 100.0, 0.01, 1.0, 5.0, 0.0])
    features += torch.tensor([0.0, 3.0, 1.0, -2.0, 0.0, 7.0])
    slopes = torch.tensor([0.5, -0.02, 30.0, 0.0, 0.1, 0.0])
    return features, features @ slopes + 2 + noise * torch.randn(tokens, generator=generator)


def halves(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """(2, width): every other part, and the rest."""
    sums = torch.zeros(2, linear.width(D), dtype=torch.float64)
    for number, part in enumerate(parts):
        linear.add_tokens(sums[number % 2], *part)
    return sums


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), penalty=st.sampled_from(linear.PENALTIES))
def test_a_fit_is_least_squares_of_standardised_features_with_rows_for_the_penalty(seed: int, penalty: float) -> None:
    features, target = data(seed, 80)
    found = linear._fit(linear._full(halves((features, target))[0], D), penalty).numpy()
    x, y = features.double().numpy(), target.double().numpy()
    scale = np.where(x.std(0) > 1e-5, x.std(0), np.inf)
    rows = np.concatenate([(x - x.mean(0)) / scale, np.sqrt(penalty * len(x)) * np.eye(D)])
    slopes = np.linalg.lstsq(rows, np.concatenate([y - y.mean(), np.zeros(D)]), rcond=None)[0] / scale
    np.testing.assert_allclose(found, [*slopes, y.mean() - slopes @ x.mean(0)], rtol=1e-6, atol=1e-9)
    assert found[-2] == 0  # the constant feature


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), cut=st.integers(1, 79))
def test_sums_do_not_depend_on_how_tokens_are_cut_into_batches(seed: int, cut: int) -> None:
    features, target = data(seed, 80)
    at_once = halves((features, target))
    sums = torch.zeros(linear.width(D), dtype=torch.float64)
    for part in (slice(0, cut), slice(cut, None)):
        linear.add_tokens(sums, features[part], target[part])
    torch.testing.assert_close(sums, at_once[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("noise", "tokens", "strong"), [(0.01, 400, False), (50.0, 8, True)])
def test_what_one_half_predicts_of_the_other_chooses_the_penalty(noise: float, tokens: int, strong: bool) -> None:
    parts = [data(seed, tokens, noise) for seed in (1, 2)]
    sums = halves(*parts)
    found, _ = linear.solve(sums, D)
    both = linear._full(sums[0] + sums[1], D)
    (used,) = [one for one in linear.PENALTIES if torch.equal(linear._fit(both, one), found)]
    assert used == (max if strong else min)(linear.PENALTIES)


def test_the_range_is_that_of_the_predictions() -> None:
    parts = [data(seed, 300) for seed in (1, 2)]
    found, (low, high) = linear.solve(halves(*parts), D)
    predicted = torch.cat([features.double() @ found[:-1] + found[-1] for features, _ in parts])
    assert float(low) == pytest.approx(float(predicted.mean() - 3 * predicted.std(correction=0)), rel=1e-6)
    assert float(high) == pytest.approx(float(predicted.mean() + 3 * predicted.std(correction=0)), rel=1e-6)


def test_a_cell_with_tokens_in_one_half_only_and_one_without_any() -> None:
    found, _ = linear.solve(halves(data(1, 50)), D)
    assert torch.equal(found, linear._fit(linear._full(halves(data(1, 50))[0], D), linear.WITHOUT_HALVES))
    found, believed = linear.solve(torch.zeros(2, linear.width(D), dtype=torch.float64), D)
    assert not found.any()
    assert not believed.any()
