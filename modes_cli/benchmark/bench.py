"""All runtimes in one process, interleaved; medians and their ratio to transformers with nothing skipped."""

from collections.abc import Iterator
from itertools import islice

import torch

from modes_cli.artifacts import Bench, Bundle
from modes_cli.artifacts.bundle import FILE as BUNDLE_FILE
from modes_cli.benchmark.cases import Timed, measure_rounds, ort_cases, summarised, torch_cases
from modes_cli.benchmark.cost import Cost
from modes_cli.benchmark.decoder import bench_decoder
from modes_cli.benchmark.machine import measure_machine
from modes_cli.data import open_source
from modes_cli.data.sample import Sample, SampleSource
from modes_cli.errors import MissingArtifact
from modes_cli.models.identity import data_info
from modes_cli.models.loading import versions
from modes_cli.requests import BenchRequest, Outcome
from modes_cli.run_folder import RunFolder, read_json
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.torch_model import open_model
from modes_cli.search.calibrated import model_spec
from modes_cli.search.selection import found_in


def bench(request: BenchRequest) -> Outcome[Bench]:
    """Time prefill and decode of the run's bundle in ONNX Runtime and of its model in PyTorch; writes bench.json.

    With a `shape`, of a decoder of these sizes with random weights, in PyTorch only.

    Raises:
        MissingArtifact: no calibration or no bundle in the run folder.
    """
    if request.shape is not None:
        return bench_decoder(request, request.shape)
    run = RunFolder(request.run)
    folder = request.bundle or run.file("bundle")
    if not (folder / BUNDLE_FILE).is_file():
        raise MissingArtifact(str(folder / BUNDLE_FILE), f"modes export{run.option}")
    bundle = read_json(folder / BUNDLE_FILE, Bundle)
    _, calibration = found_in(run)
    source = open_source(request.data, progress=request.progress)
    at = (bundle.target, bundle.decode_target) if request.target is None else (request.target, None)
    runtime = open_model(model_spec(calibration, request.device, False), run.path, *at)
    ort = OrtModel(folder, threads=torch.get_num_threads())
    machine = measure_machine(runtime.loaded.device)
    cost = Cost.of(runtime.loaded.model, runtime.loaded.blocks)
    timings: list[Timed] = []
    for size in request.batches:
        samples = list(islice(_forever(source), size))
        timings += torch_cases(runtime, samples) + ort_cases(ort, samples)
    request.progress.start("bench", request.repeats + 1)
    measure_rounds(timings, request.repeats, request.progress)
    cases = summarised(timings, lambda case: cost.limit(case.tokens, case.skip_ratio, machine, logits=case.batch))
    artifact = Bench(
        model=bundle.model,
        data=data_info(source),
        options={"repeats": request.repeats, "batches": ",".join(map(str, request.batches)), "target": bundle.target},
        versions=versions(),
        cases=cases,
        machine=machine,
        notes=[],
    )
    runtime.engine.remove()
    return Outcome(artifact, run.write(artifact))


def _forever(source: SampleSource) -> Iterator[Sample]:
    while True:
        yield from source
