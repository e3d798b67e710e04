"""What was measured of kills is what is published."""

from __future__ import annotations

import json

from tests.cli.process import ROOT
from tools.trust import kills


def test_the_published_result() -> None:
    published = json.loads((ROOT / "docs" / "benchmarks" / "trust-kills.json").read_text())
    assert published.keys() == {"command", "machine", "versions", "result"}
    result = published["result"]
    assert set(result["commands"]) == set(kills.STEPS)
    for step, found in result["commands"].items():
        assert found["random_kills"] == kills.KILLS[True], step
        assert found["survived"] == found["random_kills"] + found["operation_kills"], step
        assert found["differences"] == []
        assert found["continued"] > 0
    named = dict(kills.rows(result))
    total = sum(found["survived"] for found in result["commands"].values())
    assert named["kills survived"] == f"{total} of {total}"
    assert named["differences"] == "0"
