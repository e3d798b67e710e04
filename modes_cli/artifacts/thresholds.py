"""thresholds.json: what `modes search` found."""

from typing import ClassVar

from pydantic import Field, model_validator

from modes_cli.artifacts.base import Artifact, NonNegative, Positive, Ratio, Sha256, Strict


class FrontierPoint(Strict):
    """One measured pair of thresholds: g is the skip ratio, f the damage (mean KL at answer tokens, nats)."""

    tau: dict[str, NonNegative]
    skip_ratio: Ratio
    kl: NonNegative


class Alternative(Strict):
    """The best point of one policy that was tried for a target; `kl` as in SearchResult, `share` of the samples measured."""

    policy: str
    parameters: dict[str, float]
    tau: dict[str, NonNegative]
    skip_ratio: Ratio
    kl: NonNegative
    kl_selection: NonNegative
    share: Ratio


class DistinctExperts(Strict):
    """Mean number of different experts that one MoE layer needs for a batch of tokens that are decoded together."""

    batch: Positive
    full: NonNegative
    skipped: NonNegative


class SearchResult(Strict):
    """The thresholds for one target, confirmed by a measured pass over the whole calibration set.

    `kl` is mean KL(p_full || p_skipped) over all answer tokens, nats. `kl_selection` is that of the half of the samples that
    chose the policy and its parameters, `kl_held_out` that of the other half.
    """

    target: Ratio
    decode_target: Ratio | None  # a least skip ratio of the group `decode`; None: whatever comes
    policy: str
    parameters: dict[str, float]  # of the policy: for `tempered`, the power
    tau: dict[str, NonNegative]
    skip_ratio: Ratio
    skip_ratio_per_group: dict[str, Ratio]
    skip_ratio_per_layer: dict[str, dict[str, Ratio]]  # layer -> all and each group that has tokens
    kl: NonNegative
    kl_selection: NonNegative
    kl_held_out: NonNegative
    predicted_skip_ratio: Ratio
    model_passes: NonNegative
    distinct_experts: list[DistinctExperts]
    frontier: list[FrontierPoint]  # measured on the way; none is beaten by another in both ratio and damage
    alternatives: list[Alternative]  # by rising kl_selection, the chosen policy first

    @model_validator(mode="after")
    def _reaches_its_target(self) -> "SearchResult":
        if self.skip_ratio < self.target:
            raise ValueError(f"skip_ratio {self.skip_ratio!r} is below its target {self.target!r}")
        decode = self.skip_ratio_per_group.get("decode", 0.0)
        if self.decode_target is not None and decode < self.decode_target:
            raise ValueError(f"skip_ratio of decode {decode!r} is below its target {self.decode_target!r}")
        return self


class FrontierEntry(Strict):
    """What one policy reaches at one ratio: the price list of the model. `share` of the calibration samples was measured."""

    target: Ratio
    policy: str
    parameters: dict[str, float]
    tau: dict[str, NonNegative]
    skip_ratio: Ratio
    skip_ratio_per_group: dict[str, Ratio]
    kl: NonNegative
    share: Ratio


class Thresholds(Artifact):
    FILE: ClassVar[str] = "thresholds.json"
    COMMAND: ClassVar[str] = "search"

    calibration: Sha256  # of calibration.json
    groups: list[str] = Field(min_length=1)
    results: list[SearchResult] = Field(min_length=1)
    frontier: list[FrontierEntry]  # by policy, then by rising target; empty with `--no-frontier`
    model_passes: NonNegative
    grid: Positive

    def groups_with_tau(self) -> list[str]:
        """Token groups that some result has a threshold for."""
        return list(dict.fromkeys(group for one in self.results for group in one.tau))

    def groups_counted(self) -> list[str]:
        """Token groups that some result has a skip ratio of."""
        return list(dict.fromkeys(group for one in self.results for group in one.skip_ratio_per_group))

    @model_validator(mode="after")
    def _targets_differ(self) -> "Thresholds":
        targets = [(result.target, -1.0 if result.decode_target is None else result.decode_target) for result in self.results]
        if targets != sorted(set(targets)):
            raise ValueError(f"targets {targets} are not in rising order, each once")
        return self
