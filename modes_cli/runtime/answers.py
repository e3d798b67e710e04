"""What a batch of prompts was answered, whatever ran it."""

from dataclasses import dataclass

from modes_cli.skipping.statistics import PairCounts


@dataclass(frozen=True)
class Answers:
    """Texts and tokens per prompt, with the pairs that were kept and the time it took.

    Attributes:
        tokens: without the end marker.
        counts: of real tokens only.
    """

    texts: list[str]
    tokens: list[list[int]]
    counts: PairCounts
    prefill_seconds: float
    decode_seconds: float

    @property
    def skip_ratio(self) -> dict[str, float]:
        """Skipped share of all pairs, and of each group's."""
        return {"all": self.counts.skip_ratio(), **self.counts.per_group()}
