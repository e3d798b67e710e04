"""The published comparison with stock operators: its page is made of its raw numbers, and says no more than they do."""

from __future__ import annotations

import json

from modes_cli.artifacts import Bench
from tools.bundle_bench import OURS, OUTPUT, STOCK, claim, page


def published() -> dict[str, list[Bench]]:
    groups: dict[str, list[Bench]] = {}
    for entry in json.loads(OUTPUT.read_text("utf-8")):
        groups.setdefault(entry["search"], []).append(Bench.model_validate(entry["bench"]))
    return groups


def test_the_page_is_made_of_the_raw_numbers() -> None:
    assert OUTPUT.with_suffix(".md").read_text("utf-8") == page(published())


def test_what_the_page_claims() -> None:
    """Each ratio that it states is the least or the largest of the raw numbers, and `slower everywhere` is said where it is."""
    text = OUTPUT.with_suffix(".md").read_text("utf-8")
    for name, runs in published().items():
        assert claim(name, runs) in text
        ratios = [c.over_stock or 0.0 for bench in runs for c in bench.cases if c.runtime == OURS]
        assert (" slower everywhere" in claim(name, runs) and "not slower" not in claim(name, runs)) == (min(ratios) > 1)
        assert f"{min(ratios):.2f}" in claim(name, runs)
        for bench in runs:
            stock = {(c.phase, c.batch): c for c in bench.cases if c.runtime == STOCK}
            assert bench.options["target"] == 0.75
            assert all(c.over_stock == stock[c.phase, c.batch].seconds / c.seconds for c in bench.cases)
            assert sum("of the bundle's at tau = 0" in note for note in bench.notes) == len(stock) / 2
            assert bench.machine.threads == 1
