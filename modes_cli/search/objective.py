"""f and g by measurement: one pass over the calibration set with a rule in force."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modes_cli.calibration.divergence import kl_sum
from modes_cli.calibration.replay import answer_logits
from modes_cli.distributed import ALONE, Ranks
from modes_cli.models.inputs import Batch
from modes_cli.models.loading import Loaded
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.policy import Rule
from modes_cli.skipping.statistics import PairCounts


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

    Several processes measure each their batches and get the same points, to the bit.

    Args:
        batches: None in the place of those that another process measures.
        reference: (answer tokens, V) log-probabilities of the unmodified model, batch after batch.
        sizes: samples and answer tokens of each batch; left out where all batches are here.
    """

    def __init__(
        self,
        loaded: Loaded,
        engine: SkipEngine,
        batches: Sequence[Batch | None],
        reference: Tensor,
        sizes: Sequence[tuple[int, int]] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._loaded, self._engine, self._batches, self._ranks = loaded, engine, batches, ranks
        sizes = sizes or [size_of(batch) for batch in batches if batch is not None]
        self._samples, self._answers = [samples for samples, _ in sizes], [answers for _, answers in sizes]
        self._reference = list(torch.split(reference, self._answers))
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
            damage = torch.zeros(count, dtype=torch.float64)
            with self._engine.using(rule=rule) as counts:
                for number, batch in enumerate(self._batches[:count]):
                    if batch is not None:
                        logits = answer_logits(self._loaded.model, batch.to(self._loaded.device))
                        damage[number] = kl_sum(self._reference[number], logits)
                total, counts = self._together(damage, counts)
                part = self.part(share)
                self._seen[key] = Point(
                    rule,
                    total / sum(self._answers[:count]),
                    counts.skip_ratio(),
                    counts.per_group(),
                    counts.per_layer(),
                    part,
                )
            self.passes += part
        return self._seen[key]

    def _together(self, damage: Tensor, counts: PairCounts) -> tuple[float, PairCounts]:
        """Damage of all batches, added in their order, and everybody's counts."""
        found = self._ranks.share({"damage": damage, "kept": counts.kept, "total": counts.total})
        everyone = PairCounts(counts.layers)
        for one in found:
            everyone.kept += one["kept"]
            everyone.total += one["total"]
        # Of each batch, all but one process have 0.
        return sum(torch.stack([one["damage"] for one in found]).sum(0).tolist(), 0.0), everyone


def size_of(batch: Batch) -> tuple[int, int]:
    """Samples and answer tokens."""
    return batch.answer.shape[0], int(batch.answer.sum())
