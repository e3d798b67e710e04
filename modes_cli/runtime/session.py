"""ONNX Runtime sessions of a bundle's graphs, with the operator registered and the weights mapped, not read."""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from modes_cli.artifacts import Bundle
from modes_cli.errors import BadArtifact, BadOption, KernelError
from modes_cli.export.integrity import LIBRARY, check_digest, check_for_loading, weight_headers
from modes_cli.export.onnx_checks import check_graph
from modes_cli.runtime import kernels

DECODER, EMBEDDING, VISION = "decoder.onnx", "embedding.onnx", "vision.onnx"
_QUIET = 3  # errors only; tau being an input with a default is not worth a warning each time


def session(bundle: Path | str, providers: Sequence[str] | None = None) -> ort.InferenceSession:
    """A session of a bundle's decoder. `providers` None: the CPU.

    Raises:
        BadArtifact: the bundle is damaged; nothing was loaded.
        KernelError: there is no operator library that loads here.
    """
    folder = Path(bundle)
    return open_graph(folder, check_for_loading(folder), DECODER, providers)


def open_graph(
    folder: Path, bundle: Bundle, name: str, providers: Sequence[str] | None = None, threads: int = 0
) -> ort.InferenceSession:
    """A session of one graph of a bundle that was checked. `threads` 0: one per core.

    Raises:
        BadOption: a bundle without graphs, or a provider that this ONNX Runtime lacks.
        BadArtifact: the graph holds what it should not, or ONNX Runtime refuses it.
    """
    if bundle.format != "onnx":
        raise BadOption(f"`{folder}` has no graphs", hint="export it with `--format onnx`, or use `--runtime torch`")
    unknown = set(providers or ()) - set(ort.get_available_providers())
    if unknown:
        raise BadOption(
            f"this ONNX Runtime has no `{', '.join(sorted(unknown))}`",
            hint=f"it has {', '.join(ort.get_available_providers())}",
        )
    check_graph(folder / name, weight_headers(folder, bundle))
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    if name == DECODER:
        _register(options, folder, bundle)
    try:
        return ort.InferenceSession(str(folder / name), options, providers=list(providers or ["CPUExecutionProvider"]))
    except Exception as error:  # ONNX Runtime's classes are not public and have no common base
        raise BadArtifact(
            str(folder / name), "graph", f"ONNX Runtime refuses it: {str(error).strip().splitlines()[0]}"
        ) from error


def _register(options: ort.SessionOptions, folder: Path, bundle: Bundle) -> None:
    """The installed library if there is one: code that comes with a bundle is only run where there is no other."""
    path = kernels.library_path()
    if path is None:
        path = folder / LIBRARY
        check_digest(folder, next(file for file in bundle.files if file.path == LIBRARY))
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # as above
        raise KernelError(
            f"the operator library `{path}` does not load: {str(error).strip().splitlines()[0]}", hint=kernels.REBUILD
        ) from error
