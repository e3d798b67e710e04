"""What is evaluated: the run's model in PyTorch or a bundle in ONNX Runtime, known before anything heavy is loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from modes_cli import files
from modes_cli.artifacts import Bundle, Calibration, Thresholds
from modes_cli.artifacts.base import ModelInfo
from modes_cli.artifacts.bundle import FILE as BUNDLE_FILE
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.data.sample import Sample
from modes_cli.errors import BadOption
from modes_cli.export.integrity import check_for_loading
from modes_cli.models.checkpoint import checkpoint_folder
from modes_cli.models.groups import SKIPPABLE
from modes_cli.models.loading import pick_device
from modes_cli.requests import EvaluateRequest, ModelSpec
from modes_cli.run_folder import RunFolder
from modes_cli.runtime.answers import Answers
from modes_cli.search.calibrated import model_spec
from modes_cli.search.selection import found_in, select

# (samples, skip?, most new tokens) -> answers
Answer = Callable[[Sequence[Sample], bool, int], Answers]


@dataclass(frozen=True)
class Searched:
    """What a comparison of policies needs of a run folder. `results`: for which targets policies are compared."""

    run: RunFolder
    spec: ModelSpec
    calibration: Calibration
    thresholds: Thresholds
    results: Sequence[SearchResult]


@dataclass(frozen=True)
class Subject:
    """`thresholds`: SHA-256 of thresholds.json or bundle.json. `calibrated_on`: digests of the calibration's samples; None: not
    known. `place`: the model's folder, and where it computes. `searched`: None for a bundle.
    """

    runtime: Literal["torch", "ort"]
    model: ModelInfo
    policy: str
    target: float
    decode_target: float | None
    thresholds: str
    text_only: bool
    calibrated_on: Sequence[str] | None
    open: Callable[[], Answer]
    place: Callable[[], tuple[Path, str]]
    searched: Searched | None = None

    def options(self, **more: str | int | float | bool | None) -> dict[str, str | int | float | bool | None]:
        """The artifact's options: what decides the result, beside the samples and the model."""
        return {
            "runtime": self.runtime,
            "target": self.target,
            "decode_target": self.decode_target,
            "thresholds": self.thresholds,
            **more,
        }


def subject_of(request: EvaluateRequest, run: RunFolder) -> Subject:
    """What a request is about.

    Raises:
        MissingArtifact, StaleArtifact, BadArtifact: there is nothing to evaluate.
        BadOption: no bundle, no such target, or options that do not go with a bundle.
    """
    return _run(request, run) if request.bundle is None else _bundle(request, run, request.bundle)


def _run(request: EvaluateRequest, run: RunFolder) -> Subject:
    thresholds, calibration = found_in(run)
    result = select(thresholds, request.target, request.decode_target)
    spec = model_spec(calibration, request.device, request.trust_remote_code, request.device_map, request.offload)

    def open_it() -> Answer:
        from modes_cli.runtime.torch_model import open_model

        runtime = open_model(spec, run.path, result.target, result.decode_target)
        return lambda samples, skip, most: runtime.answer(samples, most, runtime.rule if skip else None)

    named = request.target is not None or request.decode_target is not None
    every = [select(thresholds, one.target, one.decode_target) for one in thresholds.results]
    return Subject(
        "torch",
        calibration.model,
        result.policy,
        result.target,
        result.decode_target,
        files.sha256(run.file(Thresholds.FILE)),
        spec.text_only,
        calibration.sample_digests,
        open_it,
        lambda: (checkpoint_folder(spec), str(pick_device(request.device))),
        Searched(run, spec, calibration, thresholds, [result] if named else every),
    )


def _bundle(request: EvaluateRequest, run: RunFolder, folder: Path) -> Subject:
    if request.policies:
        raise BadOption(
            "`--policies` compares thresholds of the run's model, and a bundle has one policy", hint="leave out `--bundle`"
        )
    if not (folder / BUNDLE_FILE).is_file():
        raise BadOption(f"`{folder}` is no bundle: it has no {BUNDLE_FILE}", hint="`modes export` makes one")
    bundle = check_for_loading(folder)
    point = point_of(bundle, request.target, request.decode_target)

    def open_it() -> Answer:
        from modes_cli.runtime.ort_model import OrtModel

        model = OrtModel(folder, request.device)
        nothing = dict.fromkeys(SKIPPABLE, 0.0)
        return lambda samples, skip, most: model.generate(
            [sample.images for sample in samples],
            [sample.question for sample in samples],
            most,
            point.tau if skip else nothing,
        )

    digest = files.sha256(folder / BUNDLE_FILE)
    at, calibrated_on = (point.target, point.decode_target), _calibrated_on(run, bundle)
    place = folder, "cuda" if request.device == "cuda" else "cpu"  # as `providers_for`
    return Subject("ort", bundle.model, bundle.policy, *at, digest, False, calibrated_on, open_it, lambda: place)


class Point(NamedTuple):
    """Thresholds that a bundle can run at, by group."""

    target: float
    decode_target: float | None
    tau: Mapping[str, float]


def point_of(bundle: Bundle, target: float | None, decode_target: float | None) -> Point:
    """The bundle's own point where that is not ruled out; else as `select` chooses among results.

    Raises:
        BadOption: the bundle has no such point.
    """

    def fits(point: Point) -> bool:
        return target in (None, point.target) and decode_target in (None, point.decode_target)

    own = Point(bundle.target, bundle.decode_target, bundle.tau)
    if fits(own):
        return own
    points = [Point(point.target, point.decode_target, point.tau) for point in bundle.points]
    fitting = [point for point in points if fits(point)]
    if not fitting:
        wanted, known = _named(target, decode_target), ", ".join(_named(point.target, point.decode_target) for point in points)
        raise BadOption(f"the bundle has no point for {wanted}", hint=f"it has {known}")
    without = [point for point in fitting if decode_target is None and point.decode_target is None]
    return (without or fitting)[-1]


def _named(target: float | None, decode_target: float | None) -> str:
    parts = [] if target is None else [f"target `{target:g}`"]
    return " and ".join(parts + ([] if decode_target is None else [f"decode target `{decode_target:g}`"]))


def _calibrated_on(run: RunFolder, bundle: Bundle) -> Sequence[str] | None:
    """A bundle does not carry the digests; they are known where the run folder has the calibration it was made with."""
    if not run.exists(Calibration):
        return None
    calibration = run.read(Calibration)
    same = (calibration.model, calibration.data) == (bundle.model, bundle.calibration_data)
    return calibration.sample_digests if same else None
