"""ONNX Runtime sessions of a bundle's graphs, with the operator registered and the weights mapped, not read."""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from modes_cli.artifacts import Bundle
from modes_cli.errors import BadArtifact, BadOption, KernelError
from modes_cli.export.integrity import HALF_DECODER, graph_weights, loading
from modes_cli.export.onnx_checks import check_graph
from modes_cli.runtime import libraries
from modes_cli.runtime.providers import CPU, operator_library, require_available, require_taken, uses_cuda

DECODER, EMBEDDING, VISION = "decoder.onnx", "embedding.onnx", "vision.onnx"
_QUIET = 3  # errors only; tau being an input with a default is not worth a warning each time


def session(bundle: Path | str, providers: Sequence[str] | None = None) -> ort.InferenceSession:
    """A session of a bundle's decoder. `providers` None: the CPU. `["CUDAExecutionProvider", "CPUExecutionProvider"]`: a GPU,
    and the CPU for operators that ONNX Runtime does not have there; the graph is the one that `decoder_name` says.

    Raises:
        BadArtifact: the bundle is damaged; nothing was loaded.
        BadOption: this ONNX Runtime, or this machine, has no such provider.
        KernelError: no operator library loads here that has kernels for the providers, or ONNX Runtime gave one up.
    """
    folder = Path(bundle)
    with loading(folder) as there:
        return open_graph(folder, there, decoder_name(there, providers), providers)


def decoder_name(bundle: Bundle, providers: Sequence[str] | None = None) -> str:
    """The decoder graph for these providers. On a GPU the one in float16 or bfloat16, where the bundle has it; on the CPU, and
    for a bundle of float32 weights, the one in float32: ONNX Runtime has GroupQueryAttention for the other types there.
    """
    half = any(file.path == HALF_DECODER for file in bundle.files)
    return HALF_DECODER if half and uses_cuda(providers or [CPU]) else DECODER


def open_graph(
    folder: Path, bundle: Bundle, name: str, providers: Sequence[str] | None = None, threads: int = 0
) -> ort.InferenceSession:
    """A session of one graph of a bundle that was checked. `threads` 0: one per core.

    Raises:
        BadOption: a bundle without graphs, or a provider that this ONNX Runtime or this machine lacks.
        BadArtifact: the graph holds what it should not, or ONNX Runtime refuses it.
        KernelError: as `session`.
    """
    if bundle.format != "onnx":
        raise BadOption(f"`{folder}` has no graphs", hint="export it with `--format onnx`, or use `--runtime torch`")
    asked = list(providers or [CPU])
    require_available(asked)
    if bundle.quantization is not None and uses_cuda(asked):
        raise KernelError(
            f"experts in {bundle.quantization.scheme} are not on CUDA yet", hint=f"ask for `{CPU}` (`--device cpu`)"
        )
    check_graph(folder / name, graph_weights(folder, bundle))
    library = operator_library(folder, bundle, asked)
    options = quiet_options(threads)
    if name in (DECODER, HALF_DECODER):
        _register(options, library)
    try:
        # Its Python interface would otherwise try again with the CPU alone, and print so on stdout.
        opened = ort.InferenceSession(str(folder / name), options, providers=asked, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's classes are not public and have no common base
        raise BadArtifact(
            str(folder / name), "graph", f"ONNX Runtime refuses it: {str(error).strip().splitlines()[0]}"
        ) from error
    require_taken(opened, asked)
    return opened


def quiet_options(threads: int) -> ort.SessionOptions:
    """What every session of ours is made with. `threads` 0: one per core."""
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    return options


def _register(options: ort.SessionOptions, library: Path) -> None:
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # as above
        raise KernelError(
            f"the operator library `{library}` does not load: {str(error).strip().splitlines()[0]}",
            hint=libraries.hint(library.name),
        ) from error
