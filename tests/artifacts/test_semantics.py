"""Fields that contradict each other are refused on read and on write, whatever each of them looks like on its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modes_cli.artifacts import SCHEMAS
from modes_cli.errors import BadArtifact
from modes_cli.run_folder import RunFolder, read_json
from tests import examples

Tree = dict[str, Any]
CONTRADICTIONS: list[tuple[str, Callable[[Tree], object], str]] = [
    ("profile", lambda t: t.update(top_k=33), "top_k is 33"),
    ("profile", lambda t: t["layers"].reverse(), "layers are not in rising order"),
    ("profile", lambda t: t["layers"].pop(), "moe_layers is 8"),
    ("profile", lambda t: t.update(expert_parameters=1 << 40), "expert_parameters"),
    ("profile", lambda t: t["layers"][0]["expert_usage_entropy"].update(text=1.5), "expert_usage_entropy"),
    ("profile", lambda t: t["layers"][0]["update_angle"].update(text=181), "update_angle"),
    ("profile", lambda t: t.update(parameters=10**400), "parameters"),
    ("calibration", lambda t: t.update(top_k=999), "top_k is 999"),
    ("calibration", lambda t: t.update(samples=t["samples"] + 1, sample_digests=None), "data.samples"),
    ("calibration", lambda t: t["tokens"].update(smell=1), "smell"),
    ("calibration", lambda t: t["groups"].append(t["groups"][0]), "occurs twice"),
    ("calibration", lambda t: t.update(importance=dict(reversed(t["importance"].items()))), "rising order"),
    ("calibration", lambda t: t.update(importance={f"0{k}": v for k, v in t["importance"].items()}), "no layer"),
    ("thresholds", lambda t: t["results"][0].update(skip_ratio=0.9), "mean of its layers"),
    ("thresholds", lambda t: t["results"][0]["skip_ratio_per_group"].update(text=0.9), "mean of its layers"),
    ("thresholds", lambda t: t["results"][0]["skip_ratio_per_layer"]["0"].pop("text"), "each counted group"),
    ("thresholds", lambda t: t["results"][0]["tau"].update(smell=0.1), "smell"),
    ("thresholds", lambda t: t["results"][0]["tau"].update(text=10.0, vision=10.0), "predicted to skip"),
    ("thresholds", lambda t: t["results"][0]["frontier"].reverse(), "rising order"),
    ("thresholds", lambda t: t["frontier"].reverse(), "rising order"),
    ("thresholds", lambda t: t["groups"].append("text"), "occurs twice"),
    ("evaluation", lambda t: t.update(retained=0.5), "retained"),
    ("evaluation", lambda t: t["interval"].update(low=t["interval"]["high"] + 1), "more than high"),
    ("evaluation", lambda t: t.update(overlap=10**9), "overlap"),
    ("bundle", lambda t: t["provenance"].update(thresholds="no"), "provenance.thresholds"),
    ("bundle", lambda t: t["provenance"].pop("source"), "provenance.source"),
]


def tree(name: str) -> Tree:
    return dict(json.loads(examples.path(name).read_text("utf-8")))


@pytest.mark.parametrize(("name", "change", "words"), CONTRADICTIONS)
def test_contradictions(tmp_path: Path, name: str, change: Callable[[Tree], object], words: str) -> None:
    content = tree(name)
    change(content)
    (tmp_path / "file.json").write_text(json.dumps(content))
    with pytest.raises(BadArtifact, match=words):
        read_json(tmp_path / "file.json", SCHEMAS[name])


def test_what_nobody_could_read_is_not_written(tmp_path: Path) -> None:
    """pydantic checks what it makes, not what is copied."""
    wrong = examples.artifact("evaluation").model_copy(update={"retained": 0.5})
    with pytest.raises(ValueError, match="retained"):
        RunFolder(tmp_path).write(wrong)
    assert list(tmp_path.iterdir()) == []


def test_no_schema_takes_fields_that_it_does_not_name() -> None:
    def objects(node: Any) -> Any:
        if isinstance(node, dict):
            if "properties" in node:
                yield node
            for value in node.values():
                yield from objects(value)
        elif isinstance(node, list):
            for value in node:
                yield from objects(value)

    for name, kind in SCHEMAS.items():
        found = list(objects(kind.model_json_schema()))
        assert found, name
        assert all(one["additionalProperties"] is False for one in found), name
