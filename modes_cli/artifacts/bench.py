"""bench.json: measured times, with the machine that gave them and its own measured limits."""

from typing import ClassVar, Literal

from modes_cli.artifacts.base import Artifact, NonNegative, Positive, Ratio, Strict


class Machine(Strict):
    """Peak rates are measured in the same run, not read from a data sheet."""

    cpu: str
    threads: Positive
    device: str
    peak_flops: NonNegative
    read_bandwidth: NonNegative  # bytes per second


class Case(Strict):
    """`skip_ratio` is what was skipped; `speedup` is over `transformers` as it comes, at the same phase and batch;
    `over_stock` over the same model exported with ONNX Runtime's own operators, where that was measured.
    """

    phase: Literal["prefill", "decode"]
    tokens: Positive
    batch: Positive
    runtime: str
    skip_ratio: Ratio
    seconds: NonNegative
    speedup: NonNegative
    limit_fraction: NonNegative
    over_stock: NonNegative | None = None


class Bench(Artifact):
    FILE: ClassVar[str] = "bench.json"
    COMMAND: ClassVar[str] = "bench"

    cases: list[Case]
    machine: Machine
    notes: list[str]  # what could not be measured as intended, and why
