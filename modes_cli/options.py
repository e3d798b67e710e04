"""Options that several commands share, and what their values may be. Free of torch."""

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modes_cli.errors import BadOption

if TYPE_CHECKING:
    from modes_cli.data import DataSpec, Use

Columns = tuple[str | None, str | None, str | None]  # of image, question, answer

DIGITS = "digits"
BIG_DATA = "gqa"

# Defaults: DigitsVQA has 11 kinds of question in turn, so its counts are multiples of 11; half of Video-MMMU has about 150
# questions, on videos of 45 MB each; 1,024 is the paper's.
CALIBRATION_SAMPLES = {DIGITS: 88, "video-mmmu": 64, "else": 1024}
EVALUATION_SAMPLES = {DIGITS: 330, "video-mmmu": 100, "else": 1000}


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DeviceMap(StrEnum):
    auto = "auto"
    balanced = "balanced"
    sequential = "sequential"


class Family(StrEnum):
    known = "known"
    auto = "auto"


class Special(StrEnum):
    keep = "keep"
    skip = "skip"


class Quantize(StrEnum):
    int8 = "int8"
    int4 = "int4"


class Strategy(StrEnum):
    frontier = "frontier"
    two_pointer = "two-pointer"
    exhaustive = "exhaustive"


class Format(StrEnum):
    onnx = "onnx"
    safetensors = "safetensors"


class Runtime(StrEnum):
    ort = "ort"
    torch = "torch"


_MODEL = "Model"
_DATA = "Data"
_OUTPUT = "Run and output"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face id, checkpoint folder, or `digits` (built in).", show_default=False)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.", rich_help_panel=_MODEL)]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Of weights and activations; auto: the checkpoint's.", rich_help_panel=_MODEL)
]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: CUDA where there is one.", rich_help_panel=_MODEL)]
FamilyOption = Annotated[
    Family,
    typer.Option("--family", help="auto: also one that is not tested, if its experts are understood.", rich_help_panel=_MODEL),
]
DeviceMapOption = Annotated[
    DeviceMap | None,
    typer.Option("--device-map", help="Spread the weights over all GPUs.", show_default=False, rich_help_panel=_MODEL),
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Read each layer's weights when it runs: less memory, slower.", rich_help_panel=_MODEL)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=_MODEL)
]
SpecialOption = Annotated[
    Special,
    typer.Option("--special", help="Special tokens keep all experts, or are skipped like text.", rich_help_panel=_MODEL),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option("--quantize", help="Expert weights in 8 or 4 bits.", show_default=False, rich_help_panel=_MODEL),
]
TextOnly = Annotated[
    bool, typer.Option("--text-only", help="Allow a model without images: one modality, one threshold.", rich_help_panel=_MODEL)
]

Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="`digits`, gqa, coco, video-mmmu, a data set id, a folder, .parquet or .jsonl.  "
        "(default: digits for `digits`, else gqa)",
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(help="Split of the data set; `digits` calibrates on validation and evaluates on test.", rich_help_panel=_DATA),
]
Samples = Annotated[int | None, typer.Option(min=1, help="How many samples.", rich_help_panel=_DATA)]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in one forward pass.", rich_help_panel=_DATA)]
Seed = Annotated[int, typer.Option(help="Decides which samples are drawn.", rich_help_panel=_DATA)]
ImageColumn = Annotated[str | None, typer.Option(help="Column or key of the image.", rich_help_panel=_DATA)]
QuestionColumn = Annotated[str | None, typer.Option(help="Column or key of the question.", rich_help_panel=_DATA)]
AnswerColumn = Annotated[str | None, typer.Option(help="Column or key of the answer.", rich_help_panel=_DATA)]

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `modes export` wrote.", show_default=False)]
BundleOption = Annotated[Path | None, typer.Option("--bundle", help="Use this exported bundle instead of the run's model.")]
Target = Annotated[float | None, typer.Option(help="Which search result.  (default: the largest)", show_default=False)]
DecodeTarget = Annotated[
    float | None, typer.Option(help="Which search result, where several differ in decode's.", show_default=False)
]

RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        envvar="MODES_RUN",
        help="Run folder.  (default: modes-run)",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Ignore what the run folder has and make it again.", rich_help_panel=_OUTPUT)
]
Json = Annotated[bool, typer.Option("--json", help="Exactly one JSON object on stdout.", rich_help_panel=_OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no logs on stderr.", rich_help_panel=_OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks, and what libraries log.", rich_help_panel=_OUTPUT)]


def calibration_data(
    model: str, source: str | None, split: str | None, samples: int | None, seed: int, columns: Columns
) -> "DataSpec":
    """The samples that `profile` and `calibrate` use."""
    source = source or (DIGITS if model == DIGITS else BIG_DATA)
    return _spec("calibrate", source, split, samples or _by_source(CALIBRATION_SAMPLES, source), seed, columns)


def evaluation_data(
    model: str, source: str | None, split: str | None, samples: int | None, seed: int, columns: Columns
) -> "DataSpec":
    """The samples that `evaluate` and `bench` use; never those of the calibration on `digits`."""
    source = source or (DIGITS if model == DIGITS else BIG_DATA)
    return _spec("evaluate", source, split, samples or _by_source(EVALUATION_SAMPLES, source), seed, columns)


def _by_source(table: dict[str, int], source: str) -> int:
    return table.get(source.partition(":")[0], table["else"])  # `video-mmmu:16`: of 16 frames


def _spec(use: "Use", source: str, split: str | None, samples: int, seed: int, columns: Columns) -> "DataSpec":
    from modes_cli.data import DataSpec, default_split

    return DataSpec(source, split or default_split(source, use), samples, seed, *columns)


def require_share(option: str, value: float, *, hint: str | None = None) -> float:
    """A fraction from 0 to 1.

    Raises:
        BadOption: outside, or not a number.
    """
    if not 0.0 <= value <= 1.0:  # NaN compares false
        raise BadOption(
            f"`{option} {value:g}` is not between 0 and 1", hint=hint or f"give a fraction: `{option} 0.75` is three quarters"
        )
    return value


def parse_tau(entries: list[str] | None) -> dict[str, float] | None:
    """`text=0.01` entries as thresholds by token group; None if there are none.

    Raises:
        BadOption: no `=`, not a number, negative, infinite, or a group named twice.
    """
    if not entries:
        return None
    tau: dict[str, float] = {}
    for entry in entries:
        group, separator, number = entry.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not separator or not group or not math.isfinite(value) or value < 0 or group in tau:
            raise BadOption(
                f"`--tau {entry}` is not GROUP=THRESHOLD", hint="one for each group: `--tau text=0.01 --tau vision=0.02`"
            )
        tau[group] = value
    return tau
