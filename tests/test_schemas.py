"""schemas/ says what modes_cli.artifacts says, and its examples hold."""

import json
from pathlib import Path

import jsonschema
import pytest

from modes_cli import files
from modes_cli.artifacts import SCHEMAS
from tests import examples
from tools import schemas


def test_schemas_are_in_sync() -> None:
    assert schemas.differing() == [], "run `make schemas`"


def test_drift_is_noticed(tmp_path: Path) -> None:
    for name, text in schemas.wanted().items():
        (tmp_path / name).write_text(text, "utf-8")
    assert schemas.differing(tmp_path) == []
    (tmp_path / "profile.schema.json").write_text("{}")
    (tmp_path / "bench.schema.json").unlink()
    (tmp_path / "gone.schema.json").write_text("{}")
    assert sorted(schemas.differing(tmp_path)) == ["bench.schema.json", "gone.schema.json", "profile.schema.json"]


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_example_holds_by_the_schema_too(name: str) -> None:
    schema = json.loads((schemas.FOLDER / f"{name}.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(examples.path(name).read_text("utf-8")))


def test_the_examples_are_of_one_run() -> None:
    """They name each other by digest, as files that commands wrote one after the other do."""
    calibration, thresholds = (files.sha256(examples.path(name)) for name in ("calibration", "thresholds"))
    assert examples.artifact("thresholds").calibration == calibration
    assert examples.artifact("evaluation").thresholds == thresholds
    points = {(point.target, *point.tau.items()) for point in examples.artifact("bundle").points}
    assert points <= {(result.target, *result.tau.items()) for result in examples.artifact("thresholds").results}
