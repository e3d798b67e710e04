"""Ridge regression from sums, against least squares by numpy."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from torch import Tensor

from modes_cli.calibration import ridge

EXPERTS = 5
Matrix = NDArray[np.float64]


def data(seed: int, tokens: int, k: int = 2, absent: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Features (tokens, E + 1), experts (tokens, k), log-norms (tokens, k); `absent`: an expert that no token has."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, EXPERTS + 1, generator=generator) + torch.arange(EXPERTS + 1)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    if absent is not None:
        scores[:, absent] = -1
    experts = scores.argsort(1, descending=True)[:, :k]
    target = 0.3 * features[:, :1] + experts + torch.randn(tokens, k, generator=generator)
    return features, experts, target.double()


def summed(*parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    sums = torch.zeros(EXPERTS, ridge.width(EXPERTS), dtype=torch.float64)
    for part in parts:
        ridge.add_pairs(sums, *part)
    return sums


def of_expert(features: Tensor, experts: Tensor, target: Tensor, expert: int) -> tuple[Matrix, Matrix]:
    token, slot = (experts == expert).nonzero(as_tuple=True)
    return features[token].double().numpy(), target[token, slot].numpy()


def mean_variance(every: list[tuple[Matrix, Matrix]]) -> float:
    """Of the features about each expert's mean, over all pairs."""
    squares = sum(float(((x - x.mean(0)) ** 2).sum()) for x, _ in every if len(x))
    return squares / (sum(len(x) for x, _ in every) * (EXPERTS + 1))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), strength=st.sampled_from([1e-6, 0.1, 1.0, 30.0]))
def test_is_least_squares_with_rows_for_the_penalty(seed: int, strength: float) -> None:
    made = data(seed, 60)
    found = ridge.solve(summed(made), strength).numpy()
    every = [of_expert(*made, expert) for expert in range(EXPERTS)]
    penalty = np.sqrt(strength * mean_variance(every))
    for expert, (x, y) in enumerate(every):
        centred, offset = x - x.mean(0), y - y.mean()
        rows = np.concatenate([centred, penalty * np.eye(x.shape[1])])
        slopes, *_ = np.linalg.lstsq(rows, np.concatenate([offset, np.zeros(x.shape[1])]), rcond=None)
        np.testing.assert_allclose(found[expert, :-1], slopes, atol=1e-6)
        assert found[expert, -1] == pytest.approx(y.mean() - slopes @ x.mean(0), abs=1e-5)


def test_an_expert_without_pairs_gets_the_mean_and_one_with_a_single_pair_its_value() -> None:
    made = data(1, 40, absent=3)
    found = ridge.solve(summed(made))
    assert not found[3, :-1].any()
    assert float(found[3, -1]) == pytest.approx(float(made[2].mean()))
    features, experts, target = data(2, 1)
    found = ridge.solve(summed((features, experts, target)))
    for slot, expert in enumerate(experts[0].tolist()):
        assert not found[expert, :-1].any()
        assert float(found[expert, -1]) == pytest.approx(float(target[0, slot]))


def test_without_any_pair_nothing_is_predicted() -> None:
    assert not ridge.solve(summed()).any()


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), cut=st.integers(0, 30))
def test_sums_add_up(seed: int, cut: int) -> None:
    made = data(seed, 30)
    parts = [tuple(tensor[:cut] for tensor in made), tuple(tensor[cut:] for tensor in made)]
    torch.testing.assert_close(summed(*parts), summed(made))  # type: ignore[arg-type]
