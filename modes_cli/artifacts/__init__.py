"""One pydantic model per artifact file. JSON Schemas under schemas/ are generated from these (`python -m tools.schemas`)."""

from modes_cli.artifacts.base import Artifact
from modes_cli.artifacts.bench import Bench
from modes_cli.artifacts.bundle import Bundle
from modes_cli.artifacts.calibration import Calibration
from modes_cli.artifacts.evaluation import Evaluation
from modes_cli.artifacts.profile import Profile
from modes_cli.artifacts.thresholds import Thresholds

__all__ = ["SCHEMAS", "Artifact", "Bench", "Bundle", "Calibration", "Evaluation", "Profile", "Thresholds"]

SCHEMAS = {
    "profile": Profile,
    "calibration": Calibration,
    "thresholds": Thresholds,
    "evaluation": Evaluation,
    "bench": Bench,
    "bundle": Bundle,
}
