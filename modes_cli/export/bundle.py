"""`modes export`: thresholds and a checkpoint become a folder that runs. No weights are ever in memory."""

import contextlib
import os
import resource
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from modes_cli import files
from modes_cli.artifacts import Bundle, Thresholds
from modes_cli.artifacts import bundle as artifact
from modes_cli.artifacts.base import flatten
from modes_cli.artifacts.bundle import BundleFile
from modes_cli.artifacts.provenance import Provenance
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadOption, KernelError, ModesError, WriteFailed
from modes_cli.export import attention, grouped, skeleton, weights
from modes_cli.export.beside import beside, raise_failure
from modes_cli.export.contents import copy_settings, describe_bundle, thresholds_bytes
from modes_cli.export.decoder import DecoderSpec, cache_shape, export_decoder
from modes_cli.export.embedding import export_embedding
from modes_cli.export.genai import RUNS
from modes_cli.export.genai import folder as genai
from modes_cli.export.integrity import (
    CUDA_LIBRARY,
    HALF_DECODER,
    LIBRARY,
    check_extra,
    check_for_loading,
    read_bundle,
)
from modes_cli.export.linking import link
from modes_cli.export.plan import Plan, make_plan, require_exportable
from modes_cli.export.provenance import gather
from modes_cli.export.thresholds import THRESHOLDS, layer_entries, read_rule
from modes_cli.export.unfinished import LIST, UnfinishedBundle, discard, folder_of
from modes_cli.export.vision import export_vision
from modes_cli.fingerprint import fingerprint
from modes_cli.locks import one_writer, replacing_folder
from modes_cli.models.groups import GROUPS
from modes_cli.models.loading import versions
from modes_cli.requests import Exported, ExportRequest, ModelSpec
from modes_cli.run_folder import RunFolder
from modes_cli.search.calibrated import model_spec, require_current
from modes_cli.search.selection import found_in, select
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Rule
from modes_cli.skipping.registry import from_result

SLACK = 64 << 20  # bytes for graphs, library and tokenizer


def export_bundle(request: ExportRequest) -> Exported:
    """Write the bundle of a run's search result. Either the whole bundle stands under its name afterwards, or what was there.
    Weights and graphs that an export which was stopped had finished are not written again.

    Raises:
        MissingArtifact, StaleArtifact: calibrate or search has to run first, or again.
        UnknownLayout: this checkpoint's tensors, or this family's graphs, are not understood.
        BadOption: no such target; a policy that no graph can have; `output` is a folder with other things in it.
        WriteFailed: not enough space.
        RunLocked: another command writes in the run folder, or the same bundle.
    """
    run = RunFolder(request.run)
    output = request.output or run.path / "bundle"
    inside = Path(os.path.realpath(run.path)) in Path(os.path.realpath(output)).parents
    with one_writer(run.path, "export") if inside else contextlib.nullcontext(), replacing_folder(output, "export"):
        return _export(request, run, output)


def _export(request: ExportRequest, run: RunFolder, output: Path) -> Exported:
    thresholds, calibration = found_in(run)
    result = select(thresholds, request.target, request.decode_target)
    require_exportable(result, onnx=request.format == "onnx")
    require_replaceable(output)
    spec = model_spec(calibration, "cpu", request.trust_remote_code)
    _require_calibrated(request.quantize, spec, run)
    rule = from_result(result, Measured(calibration, run))
    provenance = gather(request, run, thresholds, spec.quantize, _libraries() if request.format == "onnx" else {})
    if not request.fresh and (same := _same(output, thresholds, result, rule, request.format, provenance)) is not None:
        discard(folder_of(output))
        return Exported(same, output, peak_rss(), _notes(same))
    require_current(run, calibration, spec)
    plan = make_plan(spec, thresholds, result, rule, onnx=request.format == "onnx")
    unfinished = UnfinishedBundle(output, _made_from(run, plan, request), request.progress)
    with files.failing_clearly(output):
        if request.fresh:
            discard(unfinished.folder)
        unfinished.restore()
    _require_space(output, plan.targets, unfinished.bytes)
    notes: list[str] = []
    try:
        files.replace_folder(
            output,
            lambda folder: notes.extend(_fill(folder, plan, request, unfinished, provenance)),
            begun=unfinished.folder,
            ready=unfinished.close,
        )
    except BaseException:
        unfinished.stopped()
        raise
    return Exported(read_bundle(output), output, peak_rss(), tuple(notes))


def peak_rss() -> int:
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def require_replaceable(output: Path) -> None:
    """Raises BadOption unless `output` is absent, empty, or a bundle with nothing else in it: it will be replaced."""
    if not output.exists() and not output.is_symlink():
        return
    problem = "is not a folder"
    if output.is_dir() and not output.is_symlink():
        if not any(output.iterdir()):
            return
        try:
            check_extra(output, read_bundle(output))
            return
        except ModesError as error:
            problem = f"holds something else than a bundle: {error}"
    raise BadOption(f"`{output}` {problem}", hint="choose another `--output`, or remove it")


def _require_calibrated(quantize: str | None, spec: ModelSpec, run: RunFolder) -> None:
    """Raises BadOption if the thresholds were searched on other expert weights than `--quantize` asks for."""
    if quantize not in (None, spec.quantize):
        searched = "unquantised experts" if spec.quantize is None else f"experts in {spec.quantize}"
        raise BadOption(
            f"`--quantize {quantize}`: the run's thresholds were searched on {searched}",
            hint=f"`modes calibrate {spec.id}{run.option} --quantize {quantize} --fresh`, then `modes search`",
        )


def _same(
    output: Path, thresholds: Thresholds, result: SearchResult, rule: Rule, format: str, provenance: Provenance
) -> Bundle | None:
    """The bundle that is there, if it is whole and is what would be written."""
    try:
        there = check_for_loading(output)
        stored = read_rule(output, there)
    except ModesError:
        return None
    found = (there.model, there.calibration_data, there.versions, there.format)
    if there.provenance != provenance:  # other kernels, options, versions or source: what would be written says so
        return None
    chosen = (there.policy, there.parameters, there.target, there.decode_target, there.tau)
    if found != (thresholds.model, thresholds.data, versions(), format):
        return None
    if chosen != (result.policy, result.parameters, result.target, result.decode_target, result.tau):
        return None
    if format == "onnx":
        listed = {file.path for file in there.files}
        half = there.model.dtype != "float32" and there.quantization is None
        if there.family in RUNS and {genai.CONFIG, *((HALF_DECODER,) if half else ())} - listed:
            return None  # written by a version that made no such files
    return there if stored.key == rule.key else None


def _made_from(run: RunFolder, plan: Plan, request: ExportRequest) -> dict[str, object]:
    """All that the bytes of a bundle depend on."""
    options = {
        "thresholds": files.sha256(run.file(Thresholds.FILE)),
        "target": plan.result.target,
        "decode_target": plan.result.decode_target,
        "format": request.format,
        "quantize": None if plan.scheme is None else plan.scheme.name,
    }
    return fingerprint(flatten(plan.info, plan.thresholds.data, versions(), options), plan.folder)


def _require_space(output: Path, targets: list[weights.Target], there: int) -> None:
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed, free = max(0, weights.stored_bytes(targets) - there) + SLACK, shutil.disk_usage(parent).free
    if needed > free:
        raise WriteFailed(
            f"`{output}` needs `{needed}` bytes, `{free}` are free", hint="free some space, or choose another `--output`"
        )


def _notes(there: Bundle) -> tuple[str, ...]:
    """What `_fill` said of a bundle when it was written."""
    runs = there.format != "onnx" or any(file.path == genai.CONFIG for file in there.files)
    return () if runs else (genai.obstacle(there.family),)


def _fill(folder: Path, plan: Plan, request: ExportRequest, unfinished: UnfinishedBundle, provenance: Provenance) -> list[str]:
    """Write everything that is not there yet; what people should be told."""
    kept = dict(unfinished.files)
    notes: list[str] = []
    onnx, advance = request.format == "onnx", request.progress.advance
    graphs = _graphs(plan) if onnx else {}
    request.progress.start("weights and graphs" if onnx else "weights", len(plan.targets) + len(graphs))

    def write(check: Callable[[], None]) -> list[BundleFile]:
        return weights.write_weights(folder, plan.targets, advance, check, kept=kept, finished=unfinished.finished)

    with beside(write) as written:
        copy_settings(folder, plan)
        (folder / THRESHOLDS).write_bytes(thresholds_bytes(plan))
        if onnx:
            for name, export in graphs.items():
                if name not in kept:
                    _save(export(), folder / name, plan)
                    unfinished.finished(_listed(folder / name))
                advance()
                raise_failure(written)
            for name, library in _libraries().items():
                shutil.copyfile(library, folder / name)
    digests = {file.path: file for file in written.result()}
    described = provenance.model_copy(update={"kernels": []})  # which are not listed yet
    bundle = describe_bundle(plan, request.format, described, list(digests.values()))
    if onnx and (note := genai.write(folder, plan, bundle)):
        notes.append(note)
    for path in sorted(folder.iterdir()):
        if path.name not in digests and path.name != LIST:
            digests[path.name] = _listed(path)
    listed = [digests[name] for name in sorted(digests)]
    tree = bundle.model_copy(update={"files": listed, "provenance": provenance}).model_dump(mode="json")
    Bundle.model_validate(tree, strict=True)
    (folder / artifact.FILE).write_text(files.canonical_json(tree), "utf-8")
    return notes


def _listed(path: Path) -> BundleFile:
    return BundleFile(path=path.name, bytes=path.stat().st_size, sha256=files.sha256(path))


def _libraries() -> dict[str, Path]:
    """The operator libraries of this installation, by name: the CPU's, and the one with CUDA kernels where it was built."""
    from modes_cli.runtime import libraries

    found = {name: path for name in (LIBRARY, CUDA_LIBRARY) if (path := libraries.library_path(name)) is not None}
    if LIBRARY not in found:
        raise KernelError(f"the operator library `{LIBRARY}` is not installed", hint=libraries.hint(LIBRARY))
    return found


def _has_half(plan: Plan) -> bool:
    """Whether there is a decoder graph for CUDA that computes in the weights' own type. Quantised experts are not on CUDA."""
    text = plan.config.get_text_config()
    return plan.info.dtype != "float32" and plan.scheme is None and (_grouped(text) or attention.is_latent(text))


def _grouped(text: Any) -> bool:
    return grouped.fits(text, cache_shape(text))


def _graphs(plan: Plan) -> Mapping[str, Callable[[], ir.Model]]:
    """What makes each graph, by file name, in the order in which they are made."""
    assert plan.family is not None
    family, text = plan.family, plan.config.get_text_config()
    deepstack = family.deepstack(plan.config)
    spec = DecoderSpec(text, deepstack, plan.blocks, plan.tokens, plan.rule, route=True)

    def half_decoder() -> ir.Model:
        half = getattr(torch, plan.info.dtype)
        skeleton.narrow(plan.model, plan.mode, half)  # the last that is traced of it
        return export_decoder(plan.model, plan.mode, family, replace(spec, dtype=half, grouped=_grouped(text), route=False))

    made: dict[str, Callable[[], ir.Model]] = {
        "embedding.onnx": lambda: export_embedding(plan.model, plan.mode, family, plan.tokens.vision_ids, deepstack),
        "vision.onnx": lambda: export_vision(plan.model, plan.mode, family, plan.config),
        "decoder.onnx": lambda: export_decoder(plan.model, plan.mode, family, spec),
    }
    return made | ({HALF_DECODER: half_decoder} if _has_half(plan) else {})


def _save(model: ir.Model, path: Path, plan: Plan) -> None:
    link(model, weights.places(path.parent, plan.targets) | layer_entries(path.parent), path.parent, plan.aliases)
    model.metadata_props.update(
        {"modes.groups": ",".join(GROUPS), "modes.policy": plan.result.policy, "modes.model": plan.info.id}
    )
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
