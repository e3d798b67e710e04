"""`modes verify`: every promise that a bundle makes, one check each. Nothing of it is run before all else has passed."""

import json
from collections.abc import Callable
from pathlib import Path

from modes_cli import files, strict_json
from modes_cli.artifacts import Bundle
from modes_cli.errors import BadArtifact, ModesError
from modes_cli.export import integrity
from modes_cli.export.genai import folder as genai
from modes_cli.export.packing import check_scales
from modes_cli.export.provenance import here
from modes_cli.export.thresholds import layer_entries, read_rule
from modes_cli.export.watching import Watch
from modes_cli.requests import Check
from modes_cli.safetensors_header import Entry

INDEX = "model.safetensors.index.json"
_JSON_LIMIT = 64 << 20


def verify_bundle(folder: Path) -> list[Check]:
    """Look at all of a bundle. A check that fails says which file, and where in it; the rest is still looked at."""
    checks: list[Check] = []
    watch = Watch(folder)

    def run(name: str, check: Callable[[], str]) -> bool:
        try:
            checks.append(Check(name, True, check()))
        except ModesError as error:
            checks.append(Check(name, False, str(error)))
        return checks[-1].ok

    found: list[Bundle] = []
    if not run("bundle.json", lambda: _bundle(folder, found)):
        return checks
    bundle = found[0]
    if not run("files", lambda: _files(folder, bundle)):  # the rest would only repeat what is missing
        return checks
    run("digests", lambda: _digests(folder, bundle))
    run("nothing else", lambda: _extra(folder, bundle))
    tensors: dict[str, Entry] = {}
    whole = run("weights", lambda: _weights(folder, bundle, tensors))
    whole = run("thresholds", lambda: _thresholds(folder, bundle)) and whole
    genai_too = any(file.path == genai.CONFIG for file in bundle.files)
    if bundle.format == "onnx":
        if whole:
            tensors |= layer_entries(folder)
            graphs = sorted(file.path for file in bundle.files if file.path.endswith(".onnx"))
            sound = [run(name, lambda name=name: _graph(folder / name, tensors)) for name in graphs]  # type: ignore[misc]
            if genai_too and all(sound):
                run(genai.CONFIG, lambda: genai.check(folder, bundle))
        run("kernels", lambda: _kernels(folder, bundle))
        if all(check.ok for check in checks):
            run("session", lambda: _session(folder, bundle))
    elif genai_too:
        run(genai.CONFIG, lambda: genai.check(folder, bundle))
    run("unchanged", lambda: _unchanged(watch))
    return checks


def _bundle(folder: Path, found: list[Bundle]) -> str:
    bundle = integrity.read_bundle(folder)
    found.append(bundle)
    return f"{bundle.model.id} ({bundle.family}), policy {bundle.policy} at target {bundle.target:g}"


def _files(folder: Path, bundle: Bundle) -> str:
    for file in bundle.files:
        integrity.check_size(folder, file)
    return f"{len(bundle.files)} files, {sum(file.bytes for file in bundle.files)} bytes"


def _digests(folder: Path, bundle: Bundle) -> str:
    for file in bundle.files:
        integrity.check_digest(folder, file)
    return f"SHA-256 of {len(bundle.files)} files"


def _extra(folder: Path, bundle: Bundle) -> str:
    integrity.check_extra(folder, bundle)
    return "no file that is not listed"


def _weights(folder: Path, bundle: Bundle, tensors: dict[str, Entry]) -> str:
    tensors |= integrity.weight_headers(folder, bundle)
    index = folder / INDEX
    integrity.require_file(index)
    tree = strict_json.read(index, _JSON_LIMIT)
    listed = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(listed, dict):
        raise BadArtifact(str(index), "field `weight_map`", "missing")
    actual = {name: entry.file.name for name, entry in tensors.items()}
    if listed != actual:
        different = sorted(listed.items() ^ actual.items())[0][0] if all(isinstance(v, str) for v in listed.values()) else "all"
        raise BadArtifact(str(index), f"tensor `{different[:200]}`", "is not in the file that the index names")
    experts = [entry for entry in tensors.values() if len(entry.shape) == 3]
    least = min((entry.start & -entry.start for entry in experts), default=0)
    found = f"{len(tensors)} tensors in {len(set(actual.values()))} files, experts aligned to {least} bytes or more"
    if bundle.quantization is None:
        return found
    check_scales(tensors)
    return f"{found} and in {bundle.quantization.scheme}, {bundle.quantization.block} to a scale"


def _thresholds(folder: Path, bundle: Bundle) -> str:
    rule = read_rule(folder, bundle)
    formula = f", {type(rule.contribution).__name__} in the place of pi" if rule.contribution is not None else ""
    return f"{len(rule.score_scale)} layers, tau {json.dumps(bundle.tau)}{formula}"


def _graph(path: Path, tensors: dict[str, Entry]) -> str:
    from modes_cli.export.onnx_checks import check_graph

    return check_graph(path, tensors)


def _kernels(folder: Path, bundle: Bundle) -> str:
    """The libraries' digests have been compared with bundle.json; here with those that are installed and will run.

    Raises:
        BadArtifact: a library is not for the platform that it is said to be for, or for this one and not the installed one.
    """
    from modes_cli.runtime import libraries

    found = []
    for kernel in bundle.provenance.kernels:
        built = libraries.platform_of(folder / kernel.file)
        if built != kernel.platform:
            problem = f"is built for {built}; bundle.json says {kernel.platform}"
            raise BadArtifact(str(folder / kernel.file), "library", problem)
        path = libraries.library_path(kernel.file)
        if path is None:
            found.append(f"the bundle's {kernel.file} will run; none is installed")
        elif built != here():
            found.append(f"the installed {kernel.file} will run; the bundle's is for {built}")
        elif kernel.sha256 != files.sha256(path):
            problem = f"differs from that of the installed `{path}` for the same platform: export again, or verify with the"
            raise BadArtifact(str(folder / kernel.file), "SHA-256", f"{problem} installation that the bundle was made with")
        else:
            found.append(f"the installed {kernel.file} is the bundle's")
    listed = {kernel.file for kernel in bundle.provenance.kernels}
    others = [name for name in (integrity.LIBRARY, integrity.CUDA_LIBRARY) if name not in listed]
    found += [f"the installed {name} will run; the bundle has none" for name in others if libraries.library_path(name)]
    return "; ".join(found)


def _unchanged(watch: Watch) -> str:
    watch.require_unchanged()
    return "no file changed while all this was checked"


def _session(folder: Path, bundle: Bundle) -> str:
    """ONNX Runtime takes every graph, with the inputs and outputs that a bundle of this kind must have."""
    from modes_cli.runtime.session import DECODER, open_graph

    for name in integrity.GRAPHS:
        if any(file.path == name for file in bundle.files):
            opened = open_graph(folder, bundle, name)
            if name == DECODER:
                outputs = [output.name for output in opened.get_outputs()]
                expected = ["logits", "kept_pairs"] + [
                    f"present.{n}.{part}" for n in range(bundle.decoder.layers) for part in ("key", "value")
                ]
                if outputs != expected:
                    raise BadArtifact(str(folder / name), "outputs", f"are {outputs[:4]}..., should be {expected[:4]}...")
    return "ONNX Runtime loads the graphs"
