"""f and g by measurement: one pass over the calibration set with a rule in force."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modes_cli.calibration.divergence import kl_sum
from modes_cli.calibration.replay import answer_logits
from modes_cli.models.inputs import Batch
from modes_cli.models.loading import Loaded
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.policy import Rule


@dataclass(frozen=True)
class Point:
    """A measured rule. `kl` is mean KL(p_full || p_skipped) at answer tokens, nats; ratios are 0..1."""

    rule: Rule
    kl: float
    skip_ratio: float
    per_group: dict[str, float]
    per_layer: list[float]
    share: float  # of the calibration set that was measured

    @property
    def tau(self) -> tuple[float, float]:
        return float(self.rule.tau[0]), float(self.rule.tau[1])


class Objective:
    """Measures rules on a calibration set. `passes` counts what that has cost, in passes over the whole set.

    Args:
        reference: (answer tokens, V) log-probabilities of the unmodified model, batch after batch.
    """

    def __init__(self, loaded: Loaded, engine: SkipEngine, batches: list[Batch], reference: Tensor) -> None:
        self._loaded, self._engine, self._batches = loaded, engine, batches
        self._reference = list(torch.split(reference, [int(batch.answer.sum()) for batch in batches]))
        self._samples = [batch.answer.shape[0] for batch in batches]
        self._seen: dict[tuple[bytes, bytes, int], Point] = {}
        self.passes = 0.0

    def part(self, share: float) -> float:
        """What measuring a rule on a share of the batches costs: whole batches, at least one."""
        return sum(self._samples[: self._count(share)]) / sum(self._samples)

    def _count(self, share: float) -> int:
        return max(1, round(share * len(self._batches)))

    def forget(self) -> None:
        """Measure everything anew from here on."""
        self._seen.clear()

    @torch.no_grad()
    def measure(self, rule: Rule, share: float = 1.0) -> Point:
        """Measure a rule on the first `share` of the batches. A rule that was measured already costs nothing."""
        count = self._count(share)
        key = (rule.score_scale.numpy().tobytes(), rule.tau.numpy().tobytes(), count)
        if key not in self._seen:
            damage, answers = 0.0, 0
            with self._engine.using(rule=rule) as counts:
                for batch, full in zip(self._batches[:count], self._reference[:count], strict=True):
                    logits = answer_logits(self._loaded.model, batch.to(self._loaded.device))
                    damage += kl_sum(full, logits)
                    answers += full.shape[0]
                part = self.part(share)
                self._seen[key] = Point(
                    rule, damage / answers, counts.skip_ratio(), counts.per_group(), counts.per_layer(), part
                )
            self.passes += part
        return self._seen[key]
