"""Files of every released version stay readable: `python -m tools.golden` adds a folder at each release."""

from pathlib import Path

import pytest

from modes_cli import __version__, files
from modes_cli.artifacts import Bench, Calibration, Evaluation, Profile, Thresholds
from modes_cli.artifacts.base import Artifact
from modes_cli.export.verify import verify_bundle
from modes_cli.run_folder import RunFolder
from modes_cli.search.selection import found_in, select
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.registry import from_result

FOLDER = Path(__file__).parent.parent / "golden"
VERSIONS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
KINDS: tuple[type[Artifact], ...] = (Profile, Calibration, Thresholds, Evaluation, Bench)


def test_this_version_is_there() -> None:
    assert __version__ in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_artifacts(version: str, kind: type[Artifact]) -> None:
    run = RunFolder(FOLDER / version)
    found = run.read(kind)
    assert found.versions.modes == version
    if version == __version__:  # later ones may add fields
        assert files.canonical_json(found.model_dump(mode="json")) == run.file(kind.FILE).read_text("utf-8")


@pytest.mark.parametrize("version", VERSIONS)
def test_they_belong_together_and_can_be_used(version: str) -> None:
    run = RunFolder(FOLDER / version)
    thresholds, calibration = found_in(run)
    run.check_tensors(calibration.tensors, Calibration)
    rule = from_result(select(thresholds, None), Measured(calibration, run))
    assert rule.score_scale.shape[0] == calibration.moe_layers
    assert run.read(Evaluation).thresholds == files.sha256(run.file(Thresholds.FILE))


@pytest.mark.parametrize("version", VERSIONS)
def test_bundles(version: str) -> None:
    checks = verify_bundle(FOLDER / version / "bundle")
    assert len(checks) >= 7
    assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_they_are_small(version: str) -> None:
    assert sum(path.stat().st_size for path in (FOLDER / version).rglob("*") if path.is_file()) < 1_000_000
