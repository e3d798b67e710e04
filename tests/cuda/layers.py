"""Layers whose experts have as many rows as a test says."""

from collections.abc import Sequence

import torch

from tests.kernels.reference import Case, random_case


def layer(
    rows: Sequence[int],
    dtype: torch.dtype,
    *,
    hidden: int,
    intermediate: int,
    activation: str = "silu",
    biases: bool = False,
    transposed: bool = False,
    interleaved: bool = False,
    seed: int = 0,
) -> Case:
    """Expert e gets rows[e] tokens, scattered among the others'. One pair a token, all kept."""
    case = random_case(
        tokens=sum(rows), top_k=1, experts=len(rows), hidden=hidden, intermediate=intermediate, dtype=dtype,
        weight_dtype=dtype, activation=activation, biases=biases, transposed=transposed, interleaved=interleaved, tau=0.0,
        seed=seed,
    )  # fmt: skip
    ids = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    return case.but(expert_ids=ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))][:, None])
