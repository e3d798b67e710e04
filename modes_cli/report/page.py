"""The page: which sections there are, what made them, and the HTML around them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from modes_cli import files
from modes_cli.artifacts import Artifact, Bench, Bundle, Calibration, Evaluation, Profile, Thresholds
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import MissingArtifact
from modes_cli.locks import one_writer
from modes_cli.report import layers, price, quality, speed
from modes_cli.report.parts import Section, Styles, Table, group_name, share, target_name
from modes_cli.run_folder import RunFolder, read_json

REPORT = "report.html"
BUNDLE_FOLDER = "bundle"

A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True)
class Headline:
    """The few numbers at the top."""

    value: str
    name: str


def write_report(run: Path | None = None) -> Path:
    """Write report.html into the run folder: self-contained, and the same bytes for the same artifacts.

    Raises:
        MissingArtifact: there is nothing in the run folder to report on.
        BadArtifact: one of its files does not hold what it must.
        RunLocked: another command writes in the run folder.
    """
    folder = RunFolder(run)
    path = folder.file(REPORT)
    with one_writer(folder.path, "report"):
        files.write_bytes(path, render(folder).encode())
    return path


def render(folder: RunFolder) -> str:
    """The HTML of the report."""
    import jinja2

    kinds: tuple[type[Artifact], ...] = (Profile, Calibration, Thresholds, Evaluation, Bench)
    made = {kind: folder.read(kind) for kind in kinds if folder.exists(kind)}
    if not made:
        raise MissingArtifact(str(folder.file(Profile.FILE)), folder.renew(Profile))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=f"MoDES report: {next(iter(made.values())).model.id}",
        headlines=_headlines(folder),
        warnings=_warnings(folder),
        sections=_sections(folder),
        provenance=_provenance(folder, list(made.values())),
    )


def _sections(folder: RunFolder) -> list[Section]:
    def read(kind: type[A]) -> A | None:
        return folder.read(kind) if folder.exists(kind) else None

    def of(kind: type[A], id: str, title: str, make: Callable[[A], Section]) -> Section:
        found = read(kind)
        return Section(id, title, missing=folder.renew(kind)) if found is None else make(found)

    thresholds, evaluation = read(Thresholds), read(Evaluation)
    styles = Styles(
        [
            *(price.policies(thresholds) if thresholds else []),
            *((one.policy for one in evaluation.comparison) if evaluation else []),
        ]
    )
    drawn = None if thresholds is None else result_to_draw(thresholds, evaluation)

    def policies(found: Evaluation) -> Section:
        if found.comparison:
            return quality.policies(found, styles)
        return Section("policies", "Policies compared", missing=f"modes evaluate --policies all{folder.option}")

    return [
        of(Evaluation, "accuracy", "Accuracy by task", quality.accuracy),
        of(Evaluation, "policies", "Policies compared", policies),
        of(Thresholds, "frontier", "Frontier", lambda found: price.frontier(found, styles)),
        of(Thresholds, "skipping", "What is skipped", layers.skipping),
        of(Thresholds, "experts", "Experts per batch", lambda found: price.experts(found, drawn or found.results[-1])),
        of(Calibration, "scores", "Score distributions", lambda found: _distributions(folder, found, drawn)),
        of(Calibration, "importance", "Layer importance", layers.importance),
        of(Evaluation, "changed", "Answers that changed", quality.changed),
        of(Bench, "time", "Speed against the limit", speed.timing),
        of(Profile, "profile", "Structure and routing", speed.profile),
    ]


def result_to_draw(found: Thresholds, evaluation: Evaluation | None) -> SearchResult:
    """The result of which the page draws one: the evaluated one, else the largest target, which `export` takes too."""
    for one in found.results:
        if evaluation is not None and (evaluation.target, evaluation.decode_target) == (one.target, one.decode_target):
            return one
    return found.results[-1]


def _distributions(folder: RunFolder, found: Calibration, drawn: SearchResult | None) -> Section:
    from modes_cli.report import scores  # needs torch

    other = drawn is not None and not _same_calibration(folder)
    read = scores.read(folder, found, None if other else drawn)
    if read is None:
        return Section("scores", "Score distributions", missing=f"{folder.renew(Calibration)} --fresh")
    return layers.distributions(found, read, other)


def _same_calibration(folder: RunFolder) -> bool:
    return folder.read(Thresholds).calibration == files.sha256(folder.file(Calibration.FILE))


def _headlines(folder: RunFolder) -> list[Headline]:
    if not folder.exists(Evaluation):
        return []
    found = folder.read(Evaluation)
    shown = [
        Headline(share(found.retained), f"of the accuracy retained at {target_name(found.target, found.decode_target)}"),
        Headline(share(found.skipped), f"accuracy; {share(found.full)} with all experts"),
    ]
    shown += [
        Headline(share(value), "of all experts skipped" if group == "all" else f"skipped, {group_name(group)}")
        for group, value in found.skip_ratio.items()
        if group != "special"  # never skipped, by definition
    ]
    if found.skipped_seconds:
        shown.append(
            Headline(f"{found.full_seconds / found.skipped_seconds:.2f}x", f"speedup of the evaluation ({found.runtime})")
        )
    return shown


def _warnings(folder: RunFolder) -> list[str]:
    """Artifacts that do not belong together: shown, because the numbers would otherwise be read as one run's."""
    found = []
    if folder.exists(Thresholds) and folder.exists(Calibration) and not _same_calibration(folder):
        found.append(
            f"{Thresholds.FILE} was made from another {Calibration.FILE}. Renew it: {folder.renew(Thresholds)} --fresh"
        )
    if folder.exists(Evaluation):
        candidates = (folder.file(Thresholds.FILE), folder.file(BUNDLE_FOLDER) / "bundle.json")
        here = [files.sha256(path) for path in candidates if path.is_file()]
        evaluation = folder.read(Evaluation)
        if here and evaluation.thresholds not in here:
            found.append(f"{Evaluation.FILE} was made from other thresholds. Renew it: {folder.renew(Evaluation)} --fresh")
        if evaluation.overlap:
            count = f"{evaluation.overlap} of {evaluation.data.samples}"
            found.append(f"{count} evaluated samples were calibrated on too: the accuracy looks better than it is.")
    return found


def _provenance(folder: RunFolder, made: list[Artifact]) -> list[Table]:
    origin = [
        [
            one.FILE,
            f"{one.model.id}{'@' + one.model.revision if one.model.revision else ''}",
            one.model.dtype,
            f"{one.data.source}{'/' + one.data.split if one.data.split else ''}",
            str(one.data.samples),
            str(one.data.seed),
            f"modes {one.versions.modes}, torch {one.versions.torch}, transformers {one.versions.transformers}",
        ]
        for one in made
    ]
    options = [[one.FILE, name, str(value)] for one in made for name, value in sorted(one.options.items())]
    digests = [row for one in made for row in ([one.FILE, "model", one.model.digest], [one.FILE, "data", one.data.digest])]
    columns = ["file", "model", "dtype", "data", "samples", "seed", "versions"]
    tables = [Table("Model, data and versions", columns, origin, frozenset({0, 1, 2, 3, 6}))]
    if options:
        tables.append(Table("Options", ["file", "option", "value"], options, frozenset({0, 1, 2}), folded=True))
    tables.append(Table("Digests (SHA-256)", ["file", "of", "digest"], digests, frozenset({0, 1, 2}), folded=True))
    path = folder.file(BUNDLE_FOLDER) / "bundle.json"
    if path.is_file():
        bundle = read_json(path, Bundle)
        rows = [[one.path, f"{one.bytes:,}"] for one in bundle.files]
        tables.append(Table(f"Bundle ({bundle.format}, policy {bundle.policy})", ["file", "bytes"], rows, folded=True))
    return tables
