"""What each step is asked to do, and what it answers. Free of torch, so that commands can build requests at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from modes_cli.artifacts import Bundle
from modes_cli.data.sample import DataSpec
from modes_cli.progress import Progress, Silent

T = TypeVar("T")

PASSES = 40  # of a search, per target


@dataclass(frozen=True)
class ModelSpec:
    """Which checkpoint and how to load it. `id` is a Hugging Face id, a folder, or `digits`.

    `device_map`: how transformers spreads the weights over several devices. `offload`: decoder layers are read when they run.
    `family`: whether one that is not tested may be profiled and calibrated. `special`: whether special tokens keep all their
    experts, or are text like any other. `quantize`: how its expert weights are stored; they are in memory as what comes back.
    """

    id: str
    revision: str | None = None
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    device: str = "auto"  # auto | cpu | cuda
    trust_remote_code: bool = False
    text_only: bool = False
    device_map: str | None = None  # auto | balanced | sequential
    offload: bool = False
    family: str = "known"  # known | auto
    special: str = "keep"  # keep | skip
    quantize: str | None = None  # int8 | int4


@dataclass(frozen=True)
class ProfileRequest:
    model: ModelSpec
    data: DataSpec
    run: Path | None = None
    batch_size: int = 16
    fresh: bool = False
    progress: Progress = field(default_factory=Silent)


@dataclass(frozen=True)
class CalibrateRequest(ProfileRequest):
    pass


@dataclass(frozen=True)
class SearchRequest:
    """`passes`: most passes over the calibration set per target, without those that count scores or price other ratios.
    `grid`: thresholds per axis of the grid strategies. `decode_target`: a least skip ratio of the group `decode`. `frontier`:
    whether other ratios are priced too.
    """

    targets: tuple[float, ...]
    run: Path | None = None
    policy: str = "auto"
    strategy: str = "frontier"  # frontier | two-pointer | exhaustive
    passes: int = PASSES
    grid: int = 100
    device: str = "auto"
    trust_remote_code: bool = False
    fresh: bool = False
    progress: Progress = field(default_factory=Silent)
    device_map: str | None = None
    offload: bool = False
    decode_target: float | None = None
    frontier: bool = True


@dataclass(frozen=True)
class ExportRequest:
    """`target` None: the only search result, or the largest target. `decode_target`: which of those with the same target.
    `output` None: RUN/bundle. `quantize` None: as the run was calibrated.
    """

    run: Path | None = None
    output: Path | None = None
    target: float | None = None
    format: str = "onnx"  # onnx | safetensors
    trust_remote_code: bool = False
    fresh: bool = False
    progress: Progress = field(default_factory=Silent)
    decode_target: float | None = None
    quantize: str | None = None


@dataclass(frozen=True)
class GenerateRequest:
    """`tau`: per group, instead of the bundle's own."""

    bundle: Path
    images: tuple[Path, ...]
    prompt: str
    runtime: str = "ort"  # ort | torch
    tau: dict[str, float] | None = None
    max_new_tokens: int = 128
    device: str = "auto"


@dataclass(frozen=True)
class EvaluateRequest:
    """Of the run's model (runtime `torch`) or of `bundle` (runtime `ort`). `target` None: as in ExportRequest.

    `lmms_tasks`: tasks of lmms-eval, by name or as .yaml files, instead of `data`, of which `samples` limits each task.
    `policies`: others to compare with what the search chose, for its targets or for the one that is named; `all` is all.
    """

    data: DataSpec
    run: Path | None = None
    bundle: Path | None = None
    target: float | None = None
    batch_size: int = 32
    max_new_tokens: int = 32
    device: str = "auto"
    trust_remote_code: bool = False
    fresh: bool = False
    progress: Progress = field(default_factory=Silent)
    device_map: str | None = None
    offload: bool = False
    lmms_tasks: tuple[str, ...] = ()
    decode_target: float | None = None
    policies: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchRequest:
    """Prefill and decode at each of `batches`; the run's bundle in ONNX Runtime against transformers.

    With a `bundle`, its own weights and thresholds in both, on the CPU unless `device` says otherwise; no run folder is read.
    `stock`: also the same model exported with ONNX Runtime's own operators; None: where a bundle is named.
    With a `shape`: a random decoder of these sizes instead (`layers` of them), its weights and tokens by `data.seed`.
    """

    data: DataSpec
    run: Path | None = None
    bundle: Path | None = None
    target: float | None = None
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 15
    shape: str | None = None
    layers: int | None = None
    device: str = "auto"
    fresh: bool = False
    progress: Progress = field(default_factory=Silent)
    stock: bool | None = None


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """An artifact and where it lies; `reused` says that it was there already, made from exactly the same."""

    artifact: T
    path: Path
    reused: bool = False


@dataclass(frozen=True)
class Exported:
    bundle: Bundle
    path: Path
    peak_rss: int  # bytes, of the whole process
    notes: tuple[str, ...] = ()  # what the bundle lacks, and why


@dataclass(frozen=True)
class Check:
    """One thing that `modes verify` looked at."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Generated:
    text: str
    tokens: int
    skip_ratio: dict[str, float]  # all, and each group that has tokens
    prefill_seconds: float
    decode_seconds: float
