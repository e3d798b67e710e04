"""One policy, one target: what a strategy searches, and which of its points is the best."""

from dataclasses import dataclass, field

from torch import Tensor

from modes_cli.models.groups import DECODE
from modes_cli.search.objective import Objective, Point
from modes_cli.search.scoring import common_scale
from modes_cli.search.staircase import Staircase
from modes_cli.skipping.policy import Policy, Rule

TOLERANCE = 0.01  # how far above its target a result may skip
MARGIN = 0.0005  # aimed above a target, so that a small error of the prediction does not miss it


@dataclass(frozen=True)
class Target:
    """What is asked for, as shares of pairs: `ratio` of all, `decode` (if any) of the group `decode`."""

    ratio: float
    decode: float | None = None

    def met_by(self, point: Point) -> bool:
        decode = self.decode is None or point.per_group.get("decode", 0.0) >= self.decode
        return decode and point.skip_ratio >= self.ratio

    def close_to(self, point: Point) -> bool:
        """Whether a point that meets it skips hardly more than was asked for."""
        return point.skip_ratio <= self.ratio + TOLERANCE


@dataclass(frozen=True)
class Candidate:
    """A policy with its parameters; `rule`: its thresholds are placeholders; `counts`: of its scores, for `Staircase`."""

    policy: Policy
    rule: Rule
    counts: Tensor

    def staircase(self, decode_share: float | None = None) -> Staircase:
        """`decode_share`: at least so many pairs of decode are skipped, by a threshold of its own."""
        together = Staircase(self.counts, common_scale(self.rule))
        if decode_share is None:
            return together
        return Staircase(self.counts, common_scale(self.rule), together.tau_for((DECODE,), decode_share))


@dataclass
class Problem:
    """Measures points of one candidate for one target."""

    candidate: Candidate
    target: Target
    objective: Objective
    start: tuple[float, ...] = (0.3, 0.15, 0.5, 0.75)  # places of the edge that are measured first
    measured: list[Point] = field(default_factory=list)
    staircase: Staircase = field(init=False)
    _decode_share: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.target.decode is not None:
            self._decode_share = min(1.0, self.target.decode + MARGIN)
        self.staircase = self.candidate.staircase(self._decode_share)

    @property
    def one_threshold(self) -> bool:
        return self.candidate.policy.one_threshold

    def at(self, text: float, vision: float, share: float = 1.0) -> Point:
        tau = {"text": text, "vision": vision}
        if self.staircase.decode_tau is not None:
            tau["decode"] = self.staircase.decode_tau
        point = self.objective.measure(self.candidate.rule.with_tau(tau), share)
        if share == 1.0:
            self.measured.append(point)
        self._correct_decode(point)
        return point

    def _correct_decode(self, point: Point) -> None:
        """What layers skip changes what later ones route: aim at more where decode came out short."""
        if self._decode_share is None or self.target.decode is None:
            return
        short = self.target.decode - point.per_group.get("decode", 0.0)
        if short > 0 and self._decode_share < 1.0:
            self._decode_share = min(1.0, self._decode_share + short + MARGIN)
            self.staircase = self.candidate.staircase(self._decode_share)

    def best(self) -> Point | None:
        """The least damage among measured points that reach the target; fewer skipped pairs where damage is equal.

        Points that skip much more than was asked for count only where no other reaches the target.
        """
        feasible = [point for point in self.measured if self.target.met_by(point)]
        close = [point for point in feasible if self.target.close_to(point)]
        return min(close or feasible, key=lambda p: (p.kl, p.skip_ratio, p.tau), default=None)
