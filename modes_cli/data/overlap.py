"""Telling whether two sets of samples share some: what thresholds were tuned on says nothing when it is scored."""

import hashlib
from collections.abc import Iterable, Sequence

from modes_cli.data.sample import Sample

DIGITS = 16  # hexadecimal, of a SHA-256: 64 bits, so that a million samples collide by chance once in 10^7 runs


def sample_digest(sample: Sample) -> str:
    """What the model is shown of a sample: image sizes and pixels (RGB, rows from the top), and the question.

    Neither the id, which differs between copies of a data set, nor the answer.
    """
    question = sample.question.encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(b"modes sample 1\n" + len(question).to_bytes(8, "little") + question)
    for image in sample.images:
        digest.update(image.width.to_bytes(8, "little") + image.height.to_bytes(8, "little"))
        digest.update(image.tobytes())
    return digest.hexdigest()[:DIGITS]


def overlap(evaluated: Iterable[str], calibrated: Sequence[str]) -> int:
    """How many of the evaluated samples' digests are among those of the calibration."""
    known = set(calibrated)
    return sum(digest in known for digest in evaluated)
