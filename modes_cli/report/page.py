"""The page: which sections there are, what made them, and the HTML around them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from modes_cli import files
from modes_cli.artifacts import Artifact, Bench, Bundle, Calibration, Evaluation, Profile, Thresholds
from modes_cli.errors import MissingArtifact
from modes_cli.report import sections
from modes_cli.report.sections import Section, Table
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
    """
    folder = RunFolder(run)
    page = render(folder)
    path = folder.file(REPORT)
    files.write_bytes(path, page.encode())
    return path


def render(folder: RunFolder) -> str:
    """The HTML of the report."""
    import jinja2

    kinds: tuple[type[Artifact], ...] = (Profile, Calibration, Thresholds, Evaluation, Bench)
    made = [folder.read(kind) for kind in kinds if folder.exists(kind)]
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
        title=f"MoDES report: {made[0].model.id}",
        headlines=_headlines(folder),
        warnings=_warnings(folder),
        sections=_sections(folder),
        provenance=_provenance(folder, made),
    )


def _sections(folder: RunFolder) -> list[Section]:
    def of(kind: type[A], id: str, title: str, make: Callable[[A], Section]) -> Section:
        if folder.exists(kind):
            return make(folder.read(kind))
        return Section(id, title, missing=folder.renew(kind))

    return [
        of(Evaluation, "accuracy", "Accuracy by task", sections.accuracy),
        of(Thresholds, "skipping", "What is skipped", sections.skipping),
        of(Thresholds, "frontier", "Frontier", sections.frontier),
        of(Calibration, "importance", "Layer importance", sections.importance),
        of(Evaluation, "changed", "Answers that changed", sections.changed),
        of(Bench, "time", "Time", sections.timing),
        of(Profile, "profile", "Structure and routing", sections.profile),
    ]


def _headlines(folder: RunFolder) -> list[Headline]:
    if not folder.exists(Evaluation):
        return []
    found = folder.read(Evaluation)
    shown = [
        Headline(sections.share(found.retained), "of the accuracy retained"),
        Headline(f"{sections.share(found.full)} → {sections.share(found.skipped)}", "accuracy, all experts → skipping"),
    ]
    shown += [
        Headline(sections.share(value), "of all experts skipped" if group == "all" else f"skipped, {group}")
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
    both = folder.exists(Thresholds) and folder.exists(Calibration)
    if both and folder.read(Thresholds).calibration != files.sha256(folder.file(Calibration.FILE)):
        found.append(
            f"{Thresholds.FILE} was made from another {Calibration.FILE}. Renew it: {folder.renew(Thresholds)} --fresh"
        )
    if folder.exists(Evaluation):
        candidates = (folder.file(Thresholds.FILE), folder.file(BUNDLE_FOLDER) / "bundle.json")
        here = [files.sha256(path) for path in candidates if path.is_file()]
        if here and folder.read(Evaluation).thresholds not in here:
            found.append(f"{Evaluation.FILE} was made from other thresholds. Renew it: {folder.renew(Evaluation)} --fresh")
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
        tables.append(Table("Options", ["file", "option", "value"], options, frozenset({0, 1, 2})))
    tables.append(Table("Digests (SHA-256)", ["file", "of", "digest"], digests, frozenset({0, 1, 2})))
    path = folder.file(BUNDLE_FOLDER) / "bundle.json"
    if path.is_file():
        bundle = read_json(path, Bundle)
        tables.append(
            Table(
                f"Bundle ({bundle.format}, policy {bundle.policy})",
                ["file", "bytes"],
                [[one.path, f"{one.bytes:,}"] for one in bundle.files],
            )
        )
    return tables
