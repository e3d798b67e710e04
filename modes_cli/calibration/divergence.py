"""KL divergence between output distributions, at answer tokens."""

from torch import Tensor


def log_distribution(logits: Tensor) -> Tensor:
    """(answer tokens, V) log-probabilities, float32, on the CPU."""
    return logits.double().log_softmax(-1).float().cpu()


def kl_per_token(full: Tensor, logits: Tensor) -> Tensor:
    """KL(p_full || p) of each answer token, in nats: (answer tokens,) float64.

    Rounded distributions do not quite sum to 1, so that nearly equal ones can come out a hair below zero.

    Args:
        full: (answer tokens, V) log-probabilities of the unmodified model, as `log_distribution` gives them.
        logits: (answer tokens, V) of the model under test.
    """
    full = full.to(logits.device).double()
    other = logits.double().log_softmax(-1).float().double()  # rounded like `full`: no change is exactly 0
    return (full.exp() * (full - other)).sum(-1)


def kl_sum(full: Tensor, logits: Tensor) -> float:
    """Sum over answer tokens of KL(p_full || p), in nats, summed in float64. Arguments as in `kl_per_token`."""
    return max(0.0, float(kl_per_token(full, logits).sum()))
