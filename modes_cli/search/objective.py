"""f and g by measurement: one pass over the calibration set with a rule in force."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from modes_cli.calibration.divergence import kl_per_token
from modes_cli.calibration.replay import answer_logits
from modes_cli.calibration.scores import ScoreHistogram
from modes_cli.distributed import ALONE, Ranks
from modes_cli.models.groups import DECODE
from modes_cli.models.inputs import Batch
from modes_cli.models.loading import Loaded
from modes_cli.search.memory import Memory, pass_name
from modes_cli.search.scoring import Listener, Scores
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.policy import Rule
from modes_cli.skipping.statistics import PairCounts


@dataclass(frozen=True)
class Point:
    """A measured rule. KL is the mean of KL(p_full || p_skipped) over answer tokens, nats; ratios are 0..1.

    Attributes:
        kl: over all samples that were measured; `kl_selection` over every other one, `kl_held_out` over the rest.
        per_group: skipped share of each group's pairs.
        per_layer: of each MoE layer: `all`, and each group.
        share: of the calibration set that was measured.
    """

    rule: Rule
    kl: float
    kl_selection: float
    kl_held_out: float
    skip_ratio: float
    per_group: dict[str, float]
    per_layer: list[dict[str, float]]
    share: float

    @property
    def tau(self) -> tuple[float, float, float]:
        """Of text, vision and decode."""
        text, vision = self.rule.tau[:2].tolist()
        return text, vision, float(self.rule.tau[DECODE])

    def found(self) -> dict[str, Any]:
        """All but the rule, as JSON has it."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "rule"}


class Objective:
    """Measures rules on a calibration set. `passes` counts what that has cost, in passes over the whole set.

    Several processes measure each their batches and get the same points, to the bit.

    Args:
        batches: None in the place of those that another process measures.
        reference: (answer tokens, V) log-probabilities of the unmodified model, batch after batch.
        sizes: samples and answer tokens of each batch; left out where all batches are here.
        memory: what passes found that an earlier process made.
    """

    def __init__(
        self,
        loaded: Loaded,
        engine: SkipEngine,
        batches: Sequence[Batch | None],
        reference: Tensor,
        sizes: Sequence[tuple[int, int]] | None = None,
        ranks: Ranks = ALONE,
        memory: Memory | None = None,
    ) -> None:
        self._memory = memory or Memory(ranks=ranks)
        self.loaded, self.engine = loaded, engine
        self._batches, self._ranks = batches, ranks
        sizes = sizes or [size_of(batch) for batch in batches if batch is not None]
        self._samples, self._answers = [samples for samples, _ in sizes], [answers for _, answers in sizes]
        self._reference = list(torch.split(reference, self._answers))
        self._seen: dict[tuple[bytes, bytes, str, int], Point] = {}
        self.passes = 0.0

    @property
    def samples(self) -> int:
        return sum(self._samples)

    def part(self, share: float) -> float:
        """What measuring a rule on a share of the batches costs: whole batches, at least one."""
        return sum(self._samples[: self._count(share)]) / self.samples

    def _count(self, share: float) -> int:
        return max(1, round(share * len(self._batches)))

    def forget(self) -> None:
        """Measure everything anew from here on."""
        self._seen.clear()

    @torch.no_grad()
    def measure(self, rule: Rule, share: float = 1.0) -> Point:
        """Measure a rule on the first `share` of the batches. A rule that was measured already costs nothing."""
        count = self._count(share)
        key = (*rule.key, count)
        if key not in self._seen:
            name = pass_name("point", rule, count)
            if (known := self._memory.point(name)) is not None:
                self._seen[key] = Point(rule, **known)
            else:
                self._seen[key] = self._pass(name, rule, count, share)
                self._memory.keep_point(name, self._seen[key].found())
            self.passes += self.part(share)
        return self._seen[key]

    def _pass(self, name: str, rule: Rule, count: int, share: float) -> Point:
        done, before = self._memory.half(name)
        sums = torch.zeros(count, 2, 2, dtype=torch.float64)  # by batch, half of the samples: KL, answer tokens
        with self.engine.using(rule=rule) as counts:
            if done:
                sums.copy_(before["sums"])
                counts.kept, counts.total = before["pairs"]
            for number, batch in enumerate(self._batches[:count]):
                if batch is not None and number >= done:
                    sums[number] = self._damage(number, batch)
                    if self._memory.due:
                        pairs = torch.stack([counts.kept, counts.total])
                        self._memory.keep_half(name, number + 1, {"sums": sums, "pairs": pairs})
            return self._point(rule, sums, counts, self.part(share))

    def _damage(self, number: int, batch: Batch) -> Tensor:
        """(halves, 2): sum of KL and number of answer tokens, of every other sample and of the rest."""
        placed = batch.to(self.loaded.device)
        with self.engine.answers_at(placed.decoding):
            kl = kl_per_token(self._reference[number], answer_logits(self.loaded.model, placed)).cpu()
        half = (batch.answer.nonzero()[:, 0].cpu() + sum(self._samples[:number])) % 2
        mine = torch.stack([half == 0, half == 1]).double()
        return torch.stack([mine @ kl, mine.sum(1)], 1)

    def _point(self, rule: Rule, sums: Tensor, counts: PairCounts, share: float) -> Point:
        """Of all batches, added in their order, with everybody's counts."""
        found = self._ranks.share({"sums": sums, "kept": counts.kept, "total": counts.total})
        everyone = PairCounts(counts.layers)
        for one in found:
            everyone.kept += one["kept"]
            everyone.total += one["total"]
        together = torch.stack([one["sums"] for one in found]).sum(0)  # of each batch, all but one process have 0
        halves = [_added(together[:, half]) for half in (0, 1)]
        whole = sum(damage for damage, _ in halves) / sum(tokens for _, tokens in halves)
        selection, held_out = (damage / tokens if tokens else whole for damage, tokens in halves)
        return Point(
            rule, max(0.0, whole), max(0.0, selection), max(0.0, held_out),
            everyone.skip_ratio(), everyone.per_group(), everyone.per_layer(), share,
        )  # fmt: skip

    @torch.no_grad()
    def listen(self, listener: Listener, rule: Rule, share: float = 1.0, *, again: bool = False) -> None:
        """Show a listener the routing of a pass with `rule` in force. Costs what measuring would.

        Args:
            again: whether a search that is continued will ask for the same once more.
        """
        count = self._count(share)
        name = pass_name(type(listener).__name__, rule, count)
        if (known := self._memory.heard(name)) is not None:
            listener.take([known])
        else:
            self._hear(name, listener, rule, count)
            if again:
                self._memory.keep_heard(name, listener.state())
        self.passes += self.part(share)

    def _hear(self, name: str, listener: Listener, rule: Rule, count: int) -> None:
        done, before = self._memory.half(name)
        if done:
            listener.take([before])
        with self.engine.using(rule=rule, watch=listener.hear):
            for number, batch in enumerate(self._batches[:count]):
                if batch is not None and number >= done:
                    placed = batch.to(self.loaded.device)
                    with self.engine.answers_at(placed.decoding):
                        answer_logits(self.loaded.model, placed)
                    if self._memory.due:
                        self._memory.keep_half(name, number + 1, listener.state())
        listener.take([{**one} for one in self._ranks.share(listener.state())])

    def histogram(self, rule: Rule) -> Tensor:
        """(layers, groups, bins) int64 of what `rule` multiplies its scale with, from one pass that skips nothing."""
        scores = Scores(rule, ScoreHistogram(len(self.engine.blocks)))
        self.listen(scores, rule.with_tau({}), again=True)
        return scores.histogram.counts


def _added(parts: Tensor) -> tuple[float, float]:
    """Columns of (batches, 2) added in the order of the batches."""
    damage, tokens = (sum(column.tolist(), 0.0) for column in parts.unbind(1))
    return damage, tokens


def size_of(batch: Batch) -> tuple[int, int]:
    """Samples and answer tokens."""
    return batch.answer.shape[0], int(batch.answer.sum())
