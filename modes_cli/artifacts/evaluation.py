"""evaluation.json: accuracy, full and skipped, on samples that the search did not see."""

from typing import ClassVar, Literal

from modes_cli.artifacts.base import Artifact, Count, NonNegative, Positive, Ratio, Sha256, Strict


class TaskAccuracy(Strict):
    full: Ratio
    skipped: Ratio
    samples: Positive


class ChangedAnswer(Strict):
    """A question that the full model answers right and the skipped one does not, or the other way round."""

    id: str
    task: str
    question: str
    answer: str
    full: str
    skipped: str


class Evaluation(Artifact):
    FILE: ClassVar[str] = "evaluation.json"
    COMMAND: ClassVar[str] = "evaluate"

    runtime: Literal["torch", "ort"]
    thresholds: Sha256  # of thresholds.json, or of the bundle's bundle.json
    target: Ratio
    full: Ratio
    skipped: Ratio
    retained: NonNegative
    skip_ratio: dict[str, Ratio]
    per_task: dict[str, TaskAccuracy]
    policies: dict[str, Ratio]
    changed: list[ChangedAnswer]
    full_seconds: NonNegative
    skipped_seconds: NonNegative
    overlap: Count | None = None  # samples that were calibrated on too; None: it is not known which those are
