"""evaluation.json: accuracy, full and skipped, on samples that the search did not see."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from modes_cli.artifacts.base import Artifact, Count, NonNegative, Positive, Ratio, Sha256, Strict
from modes_cli.artifacts.semantics import require_close, require_some_of


class TaskAccuracy(Strict):
    full: Ratio
    skipped: Ratio
    samples: Positive


class Interval(Strict):
    """A 95% confidence interval of the share of accuracy that is retained: paired bootstrap over the samples.

    Where there would be one, None means that it is not known: the full model has nothing right, or a task's scores are not
    given sample by sample.
    """

    low: NonNegative
    high: NonNegative

    @model_validator(mode="after")
    def _low_is_below_high(self) -> "Interval":
        if self.low > self.high:
            raise ValueError(f"low is {self.low!r}, more than high, {self.high!r}")
        return self


class ChangedAnswer(Strict):
    """A question that the full model answers right and the skipped one does not, or the other way round.

    `image`: the sample's (first) image as a PNG of at most 160 x 160 pixels, base64; None where it has none.
    """

    id: str
    task: str
    question: str
    answer: str
    full: str
    skipped: str
    image: str | None = Field(default=None, pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=200_000)


class PolicyAccuracy(Strict):
    """One policy at one target: the price of its thresholds on the calibration set (`kl`, nats) and on these samples.

    `ahead`: accuracy less that of the policy that `modes search` chose for the target, with a 95% interval of the paired
    difference; a tie where the interval holds 0. `ties_best`: the best at the target, or a tie with it by the same measure.
    """

    policy: str
    parameters: dict[str, float]
    target: Ratio
    decode_target: Ratio | None
    tau: dict[str, NonNegative]
    skip_ratio: dict[str, Ratio]  # all, and each group
    kl: NonNegative
    accuracy: Ratio
    retained: NonNegative
    interval: Interval | None
    ahead: float = Field(allow_inf_nan=False)
    ahead_low: float = Field(allow_inf_nan=False)
    ahead_high: float = Field(allow_inf_nan=False)
    ties_best: bool
    chosen: bool


class LeftOut(Strict):
    """A policy that has no thresholds at a target, and why."""

    policy: str
    target: Ratio
    decode_target: Ratio | None
    reason: str


class Evaluation(Artifact):
    FILE: ClassVar[str] = "evaluation.json"
    COMMAND: ClassVar[str] = "evaluate"

    runtime: Literal["torch", "ort"]
    thresholds: Sha256  # of thresholds.json, or of the bundle's bundle.json
    target: Ratio
    decode_target: Ratio | None
    full: Ratio
    skipped: Ratio
    retained: NonNegative
    interval: Interval | None
    skip_ratio: dict[str, Ratio]
    per_task: dict[str, TaskAccuracy]
    policies: dict[str, Ratio]  # accuracy at `target`, by policy
    comparison: list[PolicyAccuracy]  # with `--policies`: by target, then by falling accuracy
    left_out: list[LeftOut]
    changed: list[ChangedAnswer]
    full_seconds: NonNegative
    skipped_seconds: NonNegative
    overlap: Count | None = None  # samples that were calibrated on too; None: it is not known which those are

    @model_validator(mode="after")
    def _holds_together(self) -> "Evaluation":
        require_close("retained", self.retained, "skipped / full is", self.skipped / self.full if self.full else 0.0)
        if self.overlap is not None:
            require_some_of("overlap", self.overlap, "data.samples", self.data.samples)
        return self
