"""All runtimes in one process, interleaved; medians and their ratio to transformers with nothing skipped."""

from collections.abc import Iterator
from itertools import islice

import torch

from modes_cli.artifacts import Bench, Bundle
from modes_cli.artifacts.bench import Case
from modes_cli.artifacts.bundle import FILE as BUNDLE_FILE
from modes_cli.benchmark.cases import REFERENCE, Timed, ort_cases, torch_cases
from modes_cli.benchmark.cost import Cost
from modes_cli.benchmark.machine import measure_machine, median, timed
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

    Raises:
        MissingArtifact: no calibration or no bundle in the run folder.
    """
    run = RunFolder(request.run)
    folder = request.bundle or run.file("bundle")
    if not (folder / BUNDLE_FILE).is_file():
        raise MissingArtifact(str(folder / BUNDLE_FILE), f"modes export{run.option}")
    bundle = read_json(folder / BUNDLE_FILE, Bundle)
    _, calibration = found_in(run)
    source = open_source(request.data, progress=request.progress)
    runtime = open_model(model_spec(calibration, "auto", False), run.path, request.target)
    ort = OrtModel(folder, threads=torch.get_num_threads())
    machine = measure_machine(runtime.loaded.device)
    cost = Cost.of(runtime.loaded)
    timings: list[Timed] = []
    for size in request.batches:
        samples = list(islice(_forever(source), size))
        timings += torch_cases(runtime, samples) + ort_cases(ort, samples)
    request.progress.start("bench", request.repeats + 1)
    for repeat in range(request.repeats + 1):
        for case in timings:  # interleaved, so that a slow moment of the machine hits all alike
            seconds = timed(case.work, runtime.loaded.device) / case.per
            if repeat:  # the first round warms up
                case.seconds.append(seconds)
        request.progress.advance()
    base = {(c.phase, c.batch): median(c.seconds) for c in timings if c.runtime == REFERENCE and c.skip_ratio == 0}
    cases = [
        Case(
            phase="prefill" if case.phase == "prefill" else "decode",
            tokens=case.tokens,
            batch=case.batch,
            runtime=case.runtime,
            skip_ratio=case.skip_ratio,
            seconds=median(case.seconds),
            speedup=base[case.phase, case.batch] / median(case.seconds),
            limit_fraction=cost.limit(case.tokens, case.skip_ratio, machine) / median(case.seconds),
        )
        for case in timings
    ]
    artifact = Bench(
        model=bundle.model,
        data=data_info(source),
        options={"repeats": request.repeats, "batches": ",".join(map(str, request.batches)), "target": bundle.target},
        versions=versions(),
        cases=cases,
        machine=machine,
    )
    runtime.engine.remove()
    return Outcome(artifact, run.write(artifact))


def _forever(source: SampleSource) -> Iterator[Sample]:
    while True:
        yield from source
