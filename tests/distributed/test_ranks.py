"""Which process does what."""

from __future__ import annotations

import pytest

from modes_cli.distributed import Ranks
from modes_cli.ranks import Place


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("items", [0, 1, 5, 12])
@pytest.mark.parametrize("done", [0, 1, 4])
def test_every_item_is_owned_once_and_nobody_has_two_in_a_round(world: int, items: int, done: int) -> None:
    everyone = [Ranks(Place(rank, world)) for rank in range(world)]
    rounds = list(everyone[0].rounds(range(100, 100 + items), done))
    assert [item for together in rounds for item in together] == list(enumerate(range(100, 100 + items)))
    for together in rounds:
        if together[-1][0] < done:
            continue
        owners = [[ranks.rank for ranks in everyone if ranks.owns(number)] for number, _ in together]
        assert all(len(owner) == 1 for owner in owners)
        assert len({owner[0] for owner in owners}) == len(owners)
