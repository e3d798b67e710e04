"""The example artifacts of schemas/examples/, as models and as a run folder."""

import shutil
from pathlib import Path
from typing import Any

from modes_cli import run_folder
from modes_cli.artifacts import SCHEMAS

FOLDER = Path(__file__).parent.parent / "schemas" / "examples"
IN_RUN = ("profile", "calibration", "thresholds", "evaluation", "bench")


def path(name: str) -> Path:
    return FOLDER / f"{name}.json"


def artifact(name: str) -> Any:
    return run_folder.read_json(path(name), SCHEMAS[name])


def fill_run(folder: Path, names: tuple[str, ...] = (*IN_RUN, "bundle")) -> Path:
    """Copy examples to where a run folder has them."""
    (folder / "bundle").mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(path(name), folder / "bundle" / "bundle.json" if name == "bundle" else folder / f"{name}.json")
    return folder
