"""Reading every sample once before any of them is used: what is bad, how many there are, their digest."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from modes_cli.data.images import Unusable
from modes_cli.data.rows import RawSample
from modes_cli.data.sample import DataSpec, Sample
from modes_cli.errors import BadData

MOST_BAD = 100  # more than one bad sample in so many read is refused


@dataclass(frozen=True)
class Candidate:
    """A sample that may turn out unusable: `load` reads it, or raises Unusable."""

    id: str
    load: Callable[[], RawSample]


class SampleDigest:
    """SHA-256 over samples in order. Every field is preceded by its length, so that no two sequences collide."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"modes samples 1\n")

    def add(self, sample: Sample) -> None:
        for text in (sample.id, sample.question, sample.answer):
            self._field(text.encode("utf-8", "surrogatepass"))
        self._number(len(sample.images))
        for image in sample.images:
            self._number(image.width)
            self._number(image.height)
            self._field(image.tobytes())  # RGB, rows from the top

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def _field(self, data: bytes) -> None:
        self._number(len(data))
        self._hash.update(data)

    def _number(self, value: int) -> None:
        self._hash.update(value.to_bytes(8, "little"))


class Check:
    """One pass over a data set's candidates: lets the usable ones through, counts, digests, and judges at the end.

    Args:
        name: the data set, for messages.
        wanted: how many usable samples to let through; None: all.
        planned: how many there are at most, where that is known, so that a hopeless pass stops early.
    """

    def __init__(self, name: str, wanted: int | None, planned: int | None = None) -> None:
        self.name, self.wanted = name, wanted
        self.planned = wanted if wanted is not None else planned
        self.count = 0
        self.bad: list[str] = []
        self.hint: str | None = None  # of the first bad sample
        self._digest = SampleDigest()

    def usable(self, candidates: Iterable[Candidate]) -> Iterator[RawSample]:
        """The good ones among the candidates, until there are enough.

        Raises:
            BadData: too many are bad, none are good, or there are fewer than wanted.
        """
        for candidate in candidates:
            try:
                raw = candidate.load()
                self._digest.add(raw.decode())
            except Unusable as error:
                self.refuse(candidate.id, error)
                continue
            self.count += 1
            yield raw
            if self.count == self.wanted:
                break
        self._judge()

    def refuse(self, name: str, error: Unusable) -> None:
        """Note a bad sample; give up where no good ones could make up for it any more."""
        if not self.bad:
            self.hint = error.hint
        self.bad.append(f"`{name}`: {error}")
        if self.planned is not None and len(self.bad) * MOST_BAD > self.planned + len(self.bad):
            raise self._too_many()

    def _judge(self) -> None:
        read = self.count + len(self.bad)
        if read == 0:
            raise BadData(f"`{self.name}` has no samples", hint="choose another file, data set or `--split`")
        if len(self.bad) * MOST_BAD > read:
            raise self._too_many()
        if self.wanted is not None and self.count < self.wanted:
            raise too_few(self.name, self.wanted, self.count)

    def _too_many(self) -> BadData:
        bad, read = len(self.bad), self.count + len(self.bad)
        return BadData(
            f"`{bad}` of the `{read}` samples read from `{self.name}` are unusable, more than 1%; the first is {self.bad[0]}",
            hint=self.hint or "correct these samples or take them out",
        )

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def too_few(name: str, wanted: int, count: int) -> BadData:
    """The answer to `--samples` beyond what there is."""
    return BadData(
        f"`{name}` has `{count}` usable samples, not `{wanted}`", hint=f"ask for `--samples {count}` or fewer, or leave it out"
    )


class CheckedSource:
    """A SampleSource of samples that have passed a Check. Images are decoded anew each time it is iterated.

    Args:
        candidates: gives the samples that passed, in the same order each time.
    """

    def __init__(self, spec: DataSpec, check: Check, candidates: Callable[[], Iterable[Candidate]]) -> None:
        self.spec = spec
        self._candidates = candidates
        self._count, self._digest, self._bad = check.count, check.digest, tuple(check.bad)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        """Raises BadData where a file has changed since it was checked."""
        for candidate in self._candidates():
            try:
                yield candidate.load().decode()
            except Unusable as error:
                raise BadData(
                    f"sample `{candidate.id}` was usable at first and no longer is: {error}",
                    hint="do not change the data meanwhile",
                ) from error

    @property
    def digest(self) -> str:
        return self._digest

    @property
    def bad(self) -> Sequence[str]:
        return self._bad
