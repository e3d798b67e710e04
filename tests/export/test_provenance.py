"""What a bundle says about where it comes from is what was there, and the same for the same inputs."""

from pathlib import Path

import pytest

from modes_cli import files
from modes_cli.artifacts import Calibration, Thresholds
from modes_cli.artifacts.provenance import Source
from modes_cli.export import export_bundle
from modes_cli.export import provenance as gathering
from modes_cli.requests import ExportRequest
from modes_cli.run_folder import RunFolder
from modes_cli.runtime import libraries
from modes_cli.source import source
from tests.export.bundles import make_run, read, shared_bundle, shared_checkpoint


def test_it_is_what_was_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = shared_bundle(tmp_path_factory.getbasetemp())
    run, found = RunFolder(bundle.parent), read(bundle)
    told = found.provenance
    assert told.calibration == files.sha256(run.file(Calibration.FILE))
    assert told.thresholds == files.sha256(run.file(Thresholds.FILE))
    assert told.calibration_options == run.read(Calibration).options
    assert told.search_options == run.read(Thresholds).options
    assert told.export_options == {"format": "onnx", "quantize": None, "trust_remote_code": False}
    assert told.source == source()
    cpu = libraries.library_path()
    assert cpu is not None
    kernel = next(kernel for kernel in told.kernels if kernel.file == cpu.name)
    assert (kernel.sha256, kernel.platform) == (files.sha256(cpu), libraries.platform_of(cpu))
    assert libraries.platform_of(cpu) == gathering.here()
    assert found.calibration_data == run.read(Calibration).data


def test_the_source_decides_the_bytes_and_the_folder_does_not(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", shared_checkpoint(tmp_path_factory.getbasetemp()))
    request = ExportRequest(run=run, format="safetensors")
    monkeypatch.setattr(gathering, "source", lambda: Source(commit="a" * 40, dirty=False))
    path = export_bundle(request).path / "bundle.json"
    first, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert b'"commit": "' + b"a" * 40 in first
    monkeypatch.chdir(tmp_path)
    export_bundle(request)
    assert path.stat().st_mtime_ns == stamp  # it is there already
    monkeypatch.setattr(gathering, "source", lambda: Source(commit="a" * 40, dirty=True))
    export_bundle(request)
    assert b'"dirty": true' in path.read_bytes()
    monkeypatch.setattr(gathering, "source", lambda: None)
    export_bundle(request)
    assert b'"source": null' in path.read_bytes()
    monkeypatch.setattr(gathering, "source", lambda: Source(commit="a" * 40, dirty=False))
    export_bundle(request)
    assert path.read_bytes() == first
