"""All runtimes in one process, interleaved; medians and their ratio to transformers with nothing skipped."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from modes_cli.artifacts import Bench, Bundle
from modes_cli.artifacts.bundle import FILE as BUNDLE_FILE
from modes_cli.benchmark.cases import Timed, measure_rounds, ort_cases, stock_cases, summarised, torch_cases
from modes_cli.benchmark.cost import Cost
from modes_cli.benchmark.decoder import bench_decoder
from modes_cli.benchmark.machine import measure_machine
from modes_cli.benchmark.stock import Stock, require_equal, stock_export
from modes_cli.data import open_source
from modes_cli.data.sample import Sample, SampleSource
from modes_cli.errors import BadOption, MissingArtifact
from modes_cli.evaluation.subject import point_of
from modes_cli.locks import one_writer
from modes_cli.models.identity import data_info
from modes_cli.models.loading import versions
from modes_cli.requests import BenchRequest, ModelSpec, Outcome
from modes_cli.run_folder import RunFolder, read_json
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.torch_model import TorchRuntime, open_model
from modes_cli.search.calibrated import model_spec
from modes_cli.search.selection import found_in


def bench(request: BenchRequest) -> Outcome[Bench]:
    """Time prefill and decode of the run's bundle in ONNX Runtime and of its model in PyTorch; writes bench.json.

    With a `bundle`, of that folder in both and with stock operators; with a `shape`, of a decoder of these sizes with random
    weights, in PyTorch only.

    Raises:
        MissingArtifact: no calibration or no bundle in the run folder.
        UnknownLayout: stock operators cannot express the bundle's model, or compute something else.
        BadOption: the bundle has no point for the target, or stock operators are asked for on a GPU.
        RunLocked: another command writes in the run folder.
    """
    run = RunFolder(request.run)
    with one_writer(run.path, "bench"):
        return _bench(request, run) if request.shape is None else bench_decoder(request, request.shape)


def _bench(request: BenchRequest, run: RunFolder) -> Outcome[Bench]:
    folder = request.bundle or run.file("bundle")
    if not (folder / BUNDLE_FILE).is_file():
        raise MissingArtifact(str(folder / BUNDLE_FILE), f"modes export{run.option}")
    bundle = read_json(folder / BUNDLE_FILE, Bundle)
    with_stock = request.bundle is not None if request.stock is None else request.stock
    if with_stock and request.device == "cuda":
        raise BadOption("`--device cuda`: stock operators are compared on the CPU", hint="add `--no-stock`, or leave it out")
    side = _own(request, bundle, folder) if request.bundle is not None else _of_run(request, bundle, run)
    source = open_source(request.data, progress=request.progress)
    threads = torch.get_num_threads()  # of every runtime, or the comparison would be of cores
    ort = OrtModel(folder, threads=threads)
    runtime = side.runtime
    machine = measure_machine(runtime.loaded.device)
    cost = Cost.of(runtime.loaded.model, runtime.loaded.blocks)
    timings: list[Timed] = []
    notes: list[str] = []
    with _stock(ort, threads, with_stock) as stock:
        for size in request.batches:
            samples = list(islice(_forever(source), size))
            timings += torch_cases(runtime, samples) + ort_cases(ort, samples, side.tau)
            if stock is not None:
                worst = require_equal(ort, stock.model, samples)
                notes.append(f"stock operators, batch {size}: logits within {worst:.1g} of the bundle's at tau = 0")
                timings += stock_cases(stock.model, samples)
        request.progress.start("bench", request.repeats + 1)
        measure_rounds(timings, request.repeats, request.progress)
        notes += [] if stock is None else stock.notes
    cases = summarised(timings, lambda case: cost.limit(case.tokens, case.skip_ratio, machine, logits=case.batch))
    artifact = Bench(
        model=bundle.model,
        data=data_info(source),
        options={
            "repeats": request.repeats,
            "batches": ",".join(map(str, request.batches)),
            "target": side.target,
            "stock": with_stock,
        },
        versions=versions(),
        cases=cases,
        machine=machine,
        notes=notes,
    )
    runtime.engine.remove()
    return Outcome(artifact, run.write(artifact))


@dataclass(frozen=True)
class _Side:
    """transformers' side, and at which target both sides run. `tau`: of the bundle in ONNX Runtime; None: its default."""

    runtime: TorchRuntime
    target: float
    tau: Mapping[str, float] | None = None


def _of_run(request: BenchRequest, bundle: Bundle, run: RunFolder) -> _Side:
    _, calibration = found_in(run)
    at = (bundle.target, bundle.decode_target) if request.target is None else (request.target, None)
    return _Side(open_model(model_spec(calibration, request.device, False), run.path, *at), bundle.target)


def _own(request: BenchRequest, bundle: Bundle, folder: Path) -> _Side:
    """transformers with the bundle's own weights, at one of the bundle's own points."""
    point = point_of(bundle, request.target, None)
    device = "cpu" if request.device == "auto" else request.device  # where the bundle's sessions are
    runtime = open_model(ModelSpec(str(folder), device=device), None)
    rule = runtime.rule.with_tau(point.tau)
    return _Side(TorchRuntime(runtime.loaded, runtime.engine, rule), point.target, point.tau)


@contextlib.contextmanager
def _stock(ort: OrtModel, threads: int, wanted: bool) -> Iterator[Stock | None]:
    if not wanted:
        yield None
        return
    with stock_export(ort, threads) as stock:
        yield stock


def _forever(source: SampleSource) -> Iterator[Sample]:
    while True:
        yield from source
