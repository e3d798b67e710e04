"""One calibrated, searched and exported tiny model, shared by the tests that need a whole run folder."""

from __future__ import annotations

import functools
from pathlib import Path

from modes_cli.calibration import calibrate
from modes_cli.export import export_bundle
from modes_cli.requests import ExportRequest
from modes_cli.search import find_thresholds
from tests.checkpoints import write_moe
from tests.once import once
from tests.runs import calibration_request, search_request


@functools.cache
def prepared_run(base: Path) -> tuple[Path, Path]:
    """(checkpoint, run folder): thresholds for 0.3 and 0.6, and a bundle at 0.6. Copy it before changing it."""
    checkpoint = once(base, "pipeline-checkpoint", write_moe)

    def make(run: Path) -> None:
        calibrate(calibration_request(checkpoint, run))
        find_thresholds(search_request(run, 0.3, 0.6, policy="dmt", passes=4))
        export_bundle(ExportRequest(run, target=0.6))

    return checkpoint, once(base, "pipeline-run", make)
