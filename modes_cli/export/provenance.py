"""Gathering what a bundle says about where it comes from. The same inputs and the same source give the same bytes."""

import platform
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from modes_cli import files
from modes_cli.artifacts import Calibration, Thresholds
from modes_cli.artifacts.provenance import KernelLibrary, Provenance
from modes_cli.requests import ExportRequest
from modes_cli.run_folder import RunFolder
from modes_cli.source import source

# Whose code decides what graphs and weights look like. torch and transformers are in `versions`.
_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxscript", "safetensors", "tokenizers")


def here() -> str:
    """The platform of this machine, as `linux-x86_64`."""
    return sysconfig.get_platform()


def gather(
    request: ExportRequest, run: RunFolder, thresholds: Thresholds, quantize: str | None, libraries: Mapping[str, Path]
) -> Provenance:
    """What a bundle of this run, made now, would say. `libraries`: the operator libraries that it would hold, by name."""
    return Provenance(
        calibration=thresholds.calibration,
        calibration_options=run.read(Calibration).options,
        thresholds=files.sha256(run.file(Thresholds.FILE)),
        search_options=thresholds.options,
        export_options={
            "format": request.format,
            "quantize": quantize,
            "trust_remote_code": request.trust_remote_code,
        },
        kernels=[
            KernelLibrary(file=name, platform=here(), sha256=files.sha256(path)) for name, path in sorted(libraries.items())
        ],
        libraries={"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}},
        source=source(),
    )
