"""KL divergence against PyTorch's own in float64."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from modes_cli.calibration.divergence import kl_sum, log_distribution

seeds = st.integers(0, 2**31)


def logits(seed: int, rows: int, columns: int = 50, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(seed=seeds, rows=st.integers(1, 8), spread=st.sampled_from([0.01, 1.0, 5.0, 30.0]))
def test_agrees_with_pytorch(seed: int, rows: int, spread: float) -> None:
    full, other = logits(seed, rows, spread=spread), logits(seed + 1, rows, spread=spread)
    expected = F.kl_div(other.double().log_softmax(-1), full.double().log_softmax(-1), reduction="sum", log_target=True)
    assert kl_sum(log_distribution(full), other) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


@given(seed=seeds, rows=st.integers(0, 5), noise=st.sampled_from([0.0, 1e-7, 1e-4, 1.0, 100.0]))
def test_is_never_negative_or_nan(seed: int, rows: int, noise: float) -> None:
    full = logits(seed, rows)
    assert kl_sum(log_distribution(full), full + noise * logits(seed + 1, rows)) >= 0.0


@given(seed=seeds, rows=st.integers(0, 5), spread=st.sampled_from([0.0, 1.0, 50.0]))
def test_no_change_is_exactly_no_damage(seed: int, rows: int, spread: float) -> None:
    full = logits(seed, rows, spread=spread)
    assert kl_sum(log_distribution(full), full.clone()) == 0.0


@given(seed=seeds, shift=st.floats(-50, 50, width=32))
def test_a_shift_of_all_logits_changes_nothing(seed: int, shift: float) -> None:
    full, other = logits(seed, 3), logits(seed + 1, 3)
    assert kl_sum(log_distribution(full), other + shift) == pytest.approx(kl_sum(log_distribution(full), other), rel=1e-4)


@given(seed=seeds, split=st.integers(0, 6))
def test_is_a_sum_over_tokens(seed: int, split: int) -> None:
    full, other = log_distribution(logits(seed, 6)), logits(seed + 1, 6)
    parts = kl_sum(full[:split], other[:split]) + kl_sum(full[split:], other[split:])
    assert parts == pytest.approx(kl_sum(full, other), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distributions_are_float32_and_sum_to_one(dtype: torch.dtype) -> None:
    distribution = log_distribution(logits(1, 4).to(dtype))
    assert distribution.dtype == torch.float32
    torch.testing.assert_close(distribution.double().exp().sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
