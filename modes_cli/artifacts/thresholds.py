"""thresholds.json: what `modes search` found."""

from typing import ClassVar

from pydantic import Field, model_validator

from modes_cli.artifacts.base import Artifact, NonNegative, Positive, Ratio, Sha256, Strict


class FrontierPoint(Strict):
    """One measured pair of thresholds: g is the skip ratio, f the damage (mean KL at answer tokens, nats)."""

    tau: dict[str, NonNegative]
    skip_ratio: Ratio
    kl: NonNegative


class SearchResult(Strict):
    """The thresholds for one target, confirmed by a measured pass over the whole calibration set."""

    target: Ratio
    policy: str
    parameters: dict[str, float]  # of the policy: for `tempered`, the power
    tau: dict[str, NonNegative]
    skip_ratio: Ratio
    skip_ratio_per_group: dict[str, Ratio]
    skip_ratio_per_layer: dict[str, Ratio]
    kl: NonNegative
    predicted_skip_ratio: Ratio
    model_passes: NonNegative
    frontier: list[FrontierPoint]

    @model_validator(mode="after")
    def _reaches_its_target(self) -> "SearchResult":
        if self.skip_ratio < self.target:
            raise ValueError(f"skip_ratio {self.skip_ratio!r} is below its target {self.target!r}")
        return self


class Thresholds(Artifact):
    FILE: ClassVar[str] = "thresholds.json"
    COMMAND: ClassVar[str] = "search"

    calibration: Sha256  # of calibration.json
    groups: list[str] = Field(min_length=1)
    results: list[SearchResult] = Field(min_length=1)
    model_passes: NonNegative
    grid: Positive

    @model_validator(mode="after")
    def _targets_differ(self) -> "Thresholds":
        targets = [result.target for result in self.results]
        if targets != sorted(set(targets)):
            raise ValueError(f"targets {targets} are not in rising order, each once")
        return self
