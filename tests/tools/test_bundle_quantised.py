"""Whole models with quantised experts: what is measured, and a page that says no more than the numbers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modes_cli.errors import BadOption
from tests.pipeline import prepared_run
from tools.bundle_quantised import BATCHES, OUTPUT, commands, measured, page


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_run(tmp_path_factory.getbasetemp())[1] / "bundle"


def test_every_bundle_is_timed_with_and_without_skipping(bundle: Path, tmp_path: Path) -> None:
    found = measured({"float32": bundle, "again": bundle}, 2)
    rows = {(c["bundle"], c["phase"], c["batch"], c["skipping"]): c for c in found["cases"]}
    assert len(rows) == len(found["cases"]) == 2 * 2 * len(BATCHES) * 2
    for (name, phase, batch, skipping), case in rows.items():
        base = rows["float32", phase, batch, skipping]
        assert case["speedup"] == base["seconds"] / case["seconds"] > 0
        assert case["skip_ratio"] == base["skip_ratio"]
        assert skipping or case["skip_ratio"] == 0
        assert name != "float32" or case["speedup"] == 1
    assert found["target"] == 0.6
    changed = json.loads((bundle / "bundle.json").read_text("utf-8"))
    other = tmp_path / "other"
    other.mkdir()
    for path in bundle.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "bundle.json").write_text(json.dumps(changed | {"model": changed["model"] | {"digest": "0" * 64}}), "utf-8")
    with pytest.raises(BadOption, match="different models or targets"):
        measured({"float32": bundle, "int8": other}, 1)


def made() -> dict[str, Any]:
    def case(bundle: str, phase: str, seconds: float, speedup: float) -> dict[str, Any]:
        own = {"bundle": bundle, "phase": phase, "seconds": seconds, "speedup": speedup}
        return {**own, "batch": 1, "skipping": True, "skip_ratio": 0.25}

    cases = [case("float32", "decode", 0.002, 1.0), case("int8", "decode", 0.001, 2.0), case("int8", "prefill", 0.01, 1.1)]
    cases.append(case("float32", "prefill", 0.011, 1.0))
    return {"bundles": {"float32": {"weights": 1000}, "int8": {"weights": 290}}, "cases": cases, "baseline": "float32"}


def test_the_page_states_what_was_measured() -> None:
    text = page({"digits": made()})
    assert "int8: decode is 2.00 to 2.00 times as fast as float32" in text
    assert "is 0.29 as large" in text
    assert "| decode | 1 | 25% | 2.00 | 1.00 | 2.00x |" in text
    assert "| prefill | 1 | 25% | 11.00 | 10.00 | 1.10x |" in text


def test_the_published_page_is_made_of_the_raw_numbers() -> None:
    tree = json.loads(OUTPUT.read_text("utf-8"))
    assert OUTPUT.with_suffix(".md").read_text("utf-8") == page(tree)
    for model, found in tree.items():
        assert found["commands"] == commands(model, sorted(found["bundles"]), found["repeats"])
        base = {(c["phase"], c["batch"], c["skipping"]): c for c in found["cases"] if c["bundle"] == found["baseline"]}
        for case in found["cases"]:
            assert case["speedup"] == base[case["phase"], case["batch"], case["skipping"]]["seconds"] / case["seconds"]
