"""A calibrated model, ready to be measured again on its own calibration set."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modes_cli.artifacts import Calibration
from modes_cli.artifacts.base import flatten
from modes_cli.calibration.scores import BINS
from modes_cli.data import batches, open_source
from modes_cli.data.sample import DataSpec
from modes_cli.distributed import ALONE, Ranks
from modes_cli.errors import BadArtifact
from modes_cli.models.groups import GROUPS
from modes_cli.models.identity import data_info
from modes_cli.models.inputs import Batch, measuring_batch
from modes_cli.models.loading import Loaded, describe, load, versions
from modes_cli.models.quantization import SCHEMES
from modes_cli.requests import ModelSpec
from modes_cli.run_folder import RunFolder
from modes_cli.search.memory import Memory
from modes_cli.search.objective import Objective, size_of
from modes_cli.skipping.engine import SkipEngine

T = TypeVar("T")


@dataclass(frozen=True)
class Calibrated:
    """`counts`: (layers, groups, bins) int64 score histogram of the unskipped pass."""

    objective: Objective
    counts: Tensor


def model_spec(
    calibration: Calibration, device: str, trust_remote_code: bool, device_map: str | None = None, offload: bool = False
) -> ModelSpec:
    """The checkpoint that a calibration was made of, to be loaded the same way; where its weights lie makes no difference."""
    model = calibration.model
    text_only = option(calibration, "text_only", bool)
    return ModelSpec(
        model.id, model.revision, model.dtype, device, trust_remote_code, text_only, device_map, offload,
        special=option(calibration, "special", str), quantize=quantization(calibration),
    )  # fmt: skip


def option(calibration: Calibration, name: str, kind: type[T]) -> T:
    """An option that the calibration was made with. Raises BadArtifact if it is not there, or of another type."""
    value = calibration.options.get(name)
    if type(value) is not kind:
        raise BadArtifact(Calibration.FILE, f"field `options.{name}`", f"is `{value!r}`, should be of type {kind.__name__}")
    return value


def require_current(run: RunFolder, calibration: Calibration, spec: ModelSpec) -> None:
    """Raises StaleArtifact if the checkpoint or the versions are no longer what was calibrated."""
    _, info, _ = describe(spec)
    expected = flatten(info, calibration.data, versions(), calibration.options)
    run.require_same(Calibration, calibration.identity(), expected, renew=f"modes calibrate {spec.id}{run.option} --fresh")


def quantization(calibration: Calibration) -> str | None:
    """How the expert weights were stored that the calibration was made with. Raises BadArtifact for no such scheme."""
    if "quantize" not in calibration.options:
        return None
    name = option(calibration, "quantize", str)
    if name not in SCHEMES:
        raise BadArtifact(Calibration.FILE, "field `options.quantize`", f"is `{name}`, known are {', '.join(SCHEMES)}")
    return name


@contextmanager
def recalled(
    run: RunFolder,
    calibration: Calibration,
    spec: ModelSpec,
    ranks: Ranks = ALONE,
    memory: Callable[[Loaded], Memory] | None = None,
) -> Iterator[Calibrated]:
    """Load model, samples, score histogram and reference distributions of a calibration. Of several processes, each
    prepares the samples that it measures. `memory`: of passes that were made on this model.

    Raises:
        StaleArtifact: model, versions or samples are no longer what was calibrated.
        BadArtifact: the tensors are missing or do not fit.
    """
    require_current(run, calibration, spec)
    counts, reference = _tensors(run, calibration)
    data, size = calibration.data, max(1, option(calibration, "batch_size", int))
    source = open_source(
        DataSpec(data.source, data.split, data.samples, data.seed, **_columns(calibration)), text_only=spec.text_only
    )
    renew = f"modes calibrate {spec.id}{run.option} --fresh"
    expected = {**calibration.identity(), "data.digest": data_info(source).digest}
    run.require_same(Calibration, calibration.identity(), expected, renew=renew)
    loaded = load(spec)
    layers = [str(block.layer) for block in loaded.blocks]
    if list(calibration.importance) != layers:
        raise BadArtifact(str(run.file(Calibration.FILE)), "field `importance`", f"is not about layers {', '.join(layers)}")
    prepared = [
        measuring_batch(loaded, samples).to(torch.device("cpu")) if ranks.owns(number) else None
        for number, samples in enumerate(batches(source, size))
    ]
    sizes = _sizes(prepared, ranks)
    head = loaded.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    width = reference.shape[1] if head is None else head.weight.shape[0]
    wanted = (sum(answers for _, answers in sizes), width)
    if tuple(reference.shape) != wanted:
        where = str(run.file(calibration.tensors.file))
        raise BadArtifact(where, "tensor `reference_log_probabilities`", f"is {tuple(reference.shape)}, should be {wanted}")
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    try:
        known = None if memory is None else memory(loaded)
        yield Calibrated(Objective(loaded, engine, prepared, reference, sizes, ranks, known), counts)
    finally:
        engine.remove()


def _sizes(prepared: Sequence[Batch | None], ranks: Ranks) -> list[tuple[int, int]]:
    """Samples and answer tokens of every batch, whoever has it."""
    own = torch.tensor([(0, 0) if batch is None else size_of(batch) for batch in prepared])
    total = torch.stack([found["sizes"] for found in ranks.share({"sizes": own})]).sum(0)
    return [(samples, answers) for samples, answers in total.tolist()]


def _columns(calibration: Calibration) -> dict[str, str | None]:
    names = ("image_column", "question_column", "answer_column")
    return {name: None if calibration.options.get(name) is None else option(calibration, name, str) for name in names}


def _tensors(run: RunFolder, calibration: Calibration) -> tuple[Tensor, Tensor]:
    path = run.check_tensors(calibration.tensors, Calibration)
    try:
        tensors = load_file(path)
        counts, reference = tensors["score_histogram"], tensors["reference_log_probabilities"]
    except (SafetensorError, KeyError) as error:
        raise BadArtifact(str(path), "content", str(error)) from error
    wanted = (calibration.moe_layers, len(GROUPS), BINS)
    if tuple(counts.shape) != wanted or counts.dtype != torch.int64 or bool((counts < 0).any()):
        raise BadArtifact(
            str(path),
            "tensor `score_histogram`",
            f"is {tuple(counts.shape)} {counts.dtype}, should be {wanted} int64, none negative",
        )
    pairs = torch.tensor([calibration.tokens.get(group, 0) * calibration.top_k for group in GROUPS])
    if not torch.equal(counts.sum(-1), pairs.expand(calibration.moe_layers, -1)):
        raise BadArtifact(str(path), "tensor `score_histogram`", "counts other tokens than calibration.json says there were")
    name, shape = "tensor `reference_log_probabilities`", tuple(reference.shape)
    if len(shape) != 2 or shape[0] != calibration.answer_tokens or reference.dtype != torch.float32:
        raise BadArtifact(
            str(path), name, f"is {shape} {reference.dtype}, should be ({calibration.answer_tokens}, vocabulary) float32"
        )
    if bool(torch.isnan(reference).any()):
        raise BadArtifact(str(path), name, "has NaN in it")
    return counts, reference
