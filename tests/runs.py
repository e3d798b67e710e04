"""Requests for small calibrations and searches."""

from pathlib import Path
from typing import Any

from modes_cli.data.sample import DataSpec
from modes_cli.requests import CalibrateRequest, ModelSpec, SearchRequest

SAMPLES, BATCH = 16, 8


def calibration_request(
    model: str | Path, run: Path, *, samples: int = SAMPLES, seed: int = 0, text_only: bool = False, **more: Any
) -> CalibrateRequest:
    spec = ModelSpec(str(model), device="cpu", text_only=text_only)
    return CalibrateRequest(spec, DataSpec("digits", None, samples, seed), run, **{"batch_size": BATCH, **more})


def search_request(run: Path, *targets: float, **more: Any) -> SearchRequest:
    return SearchRequest(targets, run, device="cpu", **{"passes": 12, "frontier": False, **more})


def content(run: Path) -> dict[str, bytes]:
    """Every file of a run folder."""
    return {path.name: path.read_bytes() for path in sorted(run.iterdir()) if path.is_file()}
