"""thresholds.json: what `modes search` found."""

from collections.abc import Iterable
from itertools import combinations
from typing import ClassVar

from pydantic import Field, model_validator

from modes_cli.artifacts.base import Artifact, NonNegative, Positive, Ratio, Sha256, Strict
from modes_cli.artifacts.semantics import ROUNDING, no_larger, require_close, require_known, require_once, require_rising


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

    @model_validator(mode="after")
    def _ratios_agree(self) -> "SearchResult":
        """Every MoE layer decides about the same tokens, so the ratio of all layers is the mean of theirs."""
        layers = list(self.skip_ratio_per_layer.values())
        for layer, ratios in self.skip_ratio_per_layer.items():
            if ratios.keys() != {"all", *self.skip_ratio_per_group}:
                raise ValueError(f"layer {layer[:80]} has ratios of {sorted(ratios)}, not of all and each counted group")
        if layers:
            for name, ratio in {"all": self.skip_ratio, **self.skip_ratio_per_group}.items():
                mean = sum(one[name] for one in layers) / len(layers)
                require_close(f"skip_ratio of `{name}`", ratio, "the mean of its layers", mean)
        return self

    @model_validator(mode="after")
    def _frontier_rises(self) -> "SearchResult":
        """A point that skips no more than another one and does more damage is no part of a frontier."""
        require_rising("frontier: skip_ratio", [point.skip_ratio for point in self.frontier])
        require_rising("frontier: kl", [point.kl for point in self.frontier])
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

    @model_validator(mode="after")
    def _groups_are_known(self) -> "Thresholds":
        require_once("groups", self.groups)
        for name, tau in self._taus():
            require_known(f"{name}: tau", set(tau) - {"decode"}, set(self.groups) - {"special"})
        return self

    def _taus(self) -> Iterable[tuple[str, dict[str, float]]]:
        for result in self.results:
            name = f"result for target {result.target:g}"
            yield name, result.tau
            yield from ((name, point.tau) for point in result.frontier)
            yield from ((name, other.tau) for other in result.alternatives)
        yield from ((f"frontier at {entry.target:g}", entry.tau) for entry in self.frontier)

    @model_validator(mode="after")
    def _more_is_skipped_by_larger_thresholds(self) -> "Thresholds":
        """Of the predicted ratios, which are counted on one unskipped pass. The measured ones are not bound to that: what an
        early layer skips changes what later ones see.
        """
        for one, other in combinations(self.results, 2):
            if (one.policy, one.parameters) != (other.policy, other.parameters):
                continue
            for less, more in ((one, other), (other, one)):
                if no_larger(less.tau, more.tau) and less.predicted_skip_ratio > more.predicted_skip_ratio + ROUNDING:
                    raise ValueError(
                        f"the thresholds for target {less.target:g} are no larger than those for {more.target:g}, "
                        f"but are predicted to skip {less.predicted_skip_ratio!r}, not {more.predicted_skip_ratio!r} or less"
                    )
        return self

    @model_validator(mode="after")
    def _prices_are_in_order(self) -> "Thresholds":
        """Each policy's entries stand together, by rising target."""
        priced = [(entry.policy, str(entry.parameters)) for entry in self.frontier]
        for policy in dict.fromkeys(priced):
            require_rising(
                f"frontier of `{policy[0][:80]}`", [e.target for e, p in zip(self.frontier, priced, strict=True) if p == policy]
            )
        return self
