"""The policies that a search tries, with the scores of the calibration set that each needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modes_cli.errors import BadArtifact
from modes_cli.search.objective import Objective
from modes_cli.search.problem import Candidate
from modes_cli.search.scoring import common_scale
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, Rule
from modes_cli.skipping.registry import automatic_policies, named, variants

AUTO = "auto"
PAPER = "modes"


@dataclass
class ScoreCounts:
    """Histograms of scores. Of pi, the calibration has them; any other takes a pass, and serves all rules that differ in
    their scale per layer and group only.
    """

    pi: Tensor  # (layers, groups, bins) int64
    objective: Objective

    def __post_init__(self) -> None:
        self._known: list[tuple[str, Tensor, Tensor]] = []  # contribution, scale relative to the common one, counts

    def of(self, rule: Rule) -> Tensor:
        if rule.contribution is None and rule.score_scale.dim() == 2:
            return self.pi
        key = "" if rule.contribution is None else rule.contribution.key
        common = common_scale(rule)
        relative = rule.score_scale / (common if rule.score_scale.dim() == 2 else common[..., None]).clamp_min(1e-38)
        for known, like, counts in self._known:
            if known == key and like.shape == relative.shape and torch.allclose(like, relative, atol=1e-5):
                return counts
        counts = self.objective.histogram(rule)
        self._known.append((key, relative, counts))
        return counts


def candidates(
    name: str, strategy: str, measured: Measured, scores: ScoreCounts, note: Callable[[str], None] | None = None
) -> list[Candidate]:
    """The policies to try: all variants of the one that was named (one, if its parameters were), or with `auto` of those that
    say so; the paper's first.

    The paper's own strategies take one variant, and with `auto` the paper's own policy. `note` is told of each policy that
    `auto` cannot try, and why.
    """
    if strategy != "frontier":
        tried: Sequence[Policy] = [named(PAPER if name == AUTO else name)]
    elif name != AUTO:
        tried = variants(name)
    else:
        tried = automatic_policies(first=PAPER)
    found: list[Candidate] = []
    missing: dict[str, str] = {}
    for one in tried:
        try:
            found.append(candidate(one, measured, scores))
        except BadArtifact as error:
            if name != AUTO:
                raise  # what was asked for cannot be had
            missing[one.name] = str(error)
    for kind, reason in missing.items():
        if note is not None:
            note(f"`auto` does not try `{kind}`: {reason}")
    return found


def candidate(policy: Policy, measured: Measured, scores: ScoreCounts) -> Candidate:
    """Raises BadArtifact if the calibration lacks what the policy needs."""
    rule = policy.rule(measured, {})
    return Candidate(policy, rule, scores.of(rule))
