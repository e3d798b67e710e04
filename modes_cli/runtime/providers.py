"""Which of ONNX Runtime's execution providers a session asks for, and the operator library that has kernels for them.

ONNX Runtime goes on without a provider that it cannot set up, on the CPU. Here that is an error: whoever asks for a GPU
gets a GPU, or hears why not.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from modes_cli.artifacts import Bundle
from modes_cli.errors import BadOption, KernelError
from modes_cli.runtime import libraries
from modes_cli.runtime.interface import Message

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ON_CUDA = (CUDA, "CudaPluginExecutionProvider")
_ASK_CPU = f"or ask for `{CPU}` (`--device cpu`)"


def providers_for(device: str) -> list[str]:
    """The providers of a `--device`, first choice first. `auto` is the CPU: exported graphs compute in float32, which is what
    ONNX Runtime has fast kernels for there.

    Raises:
        BadOption: no such device.
    """
    known = {"auto": [CPU], "cpu": [CPU], "cuda": [CUDA, CPU]}
    if device not in known:
        raise BadOption(f"no device `{device}`", hint=f"devices are {', '.join(known)}")
    return known[device]


def uses_cuda(providers: Sequence[str]) -> bool:
    """Whether a GPU is asked for."""
    return any(provider in ON_CUDA for provider in providers)


def require_available(providers: Sequence[str]) -> None:
    """Raises BadOption for a provider that this ONNX Runtime was built without."""
    unknown = set(providers) - set(ort.get_available_providers())
    if unknown:
        raise BadOption(
            f"this ONNX Runtime has no `{', '.join(sorted(unknown))}`",
            hint=f"it has {', '.join(ort.get_available_providers())}",
        )


def operator_library(folder: Path, bundle: Bundle, providers: Sequence[str]) -> Path:
    """The library to register for these providers: the installed one if there is one. Code that comes with a bundle is only
    run where there is no other.

    Raises:
        BadArtifact: the bundle's library is not the one that bundle.json names.
        BadOption: a GPU is asked for, and there is none that can be used.
        KernelError: there is no library with kernels for the providers, or it does not load.
    """
    cuda = uses_cuda(providers)
    name = libraries.CUDA if cuda else libraries.CPU
    path = libraries.library_path(name)
    if path is None:
        listed = next((file for file in bundle.files if file.path == name), None)
        if listed is None:
            raise KernelError(
                f"the operator library `{name}` is neither installed nor in `{folder}`",
                hint=f"{libraries.hint(name)}; {_ASK_CPU}" if cuda else libraries.hint(name),
            )
        path = libraries.sealed_copy(folder / name, listed.sha256)
    if cuda:
        _require_device(path)
    return path


def _require_device(path: Path) -> None:
    """ONNX Runtime lists its CUDA provider on machines without a GPU as well, so the library is asked."""
    library = libraries.open_library(path, cuda=True)
    count, message = ctypes.c_int32(), Message()
    if library.modes_cuda_devices(ctypes.byref(count), ctypes.byref(message)) or count.value < 1:
        said = str(message) or "no CUDA device was found"
        raise BadOption(f"`{CUDA}`: no usable GPU: {said}", hint=f"`modes doctor` says what is there; {_ASK_CPU}")


def require_taken(session: ort.InferenceSession, providers: Sequence[str]) -> None:
    """Raises KernelError if ONNX Runtime made the session without a provider that was asked for."""
    lost = [provider for provider in providers if provider not in session.get_providers()]
    if lost:
        raise KernelError(
            f"ONNX Runtime could not set up `{', '.join(lost)}`, and would run on `{', '.join(session.get_providers())}`",
            hint=f"its own message above names what is missing, mostly CUDA or cuDNN of the version it needs; {_ASK_CPU}",
        )
