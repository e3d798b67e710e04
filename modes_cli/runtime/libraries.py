"""The operator libraries: where they lie, and loading them when they are first needed.

`libmodes_cpu.so` is part of every installation. `libmodes_cuda.so` is there where the package was built with nvcc; it holds
the CPU kernels too, and loads on machines without a GPU.
"""

import ctypes
import fcntl
import functools
import hashlib
import hmac
import os
import struct
from pathlib import Path

import modes_cli
from modes_cli.errors import BadArtifact, KernelError
from modes_cli.runtime import interface

CPU, CUDA = "libmodes_cpu.so", "libmodes_cuda.so"
REBUILD = "install the package again: `pip install modes`, or `pip install -e . --no-deps --no-build-isolation` in a checkout"
REBUILD_CUDA = (
    "it is built where nvcc of CUDA 12.8 or newer is found: "
    "`pip install -e . --no-deps --no-build-isolation -C cmake.define.MODES_CUDA=ON` in a checkout"
)


def hint(name: str) -> str:
    """How a library is got."""
    return REBUILD_CUDA if name == CUDA else REBUILD


def library_path(name: str = CPU) -> Path | None:
    """Where an operator library lies, or None when this installation has none. ONNX Runtime is given this path."""
    # An editable install has two places: the checkout, and site-packages with what CMake built.
    for folder in modes_cli.__path__:
        path = Path(folder) / "lib" / name
        if path.is_file():
            return path
    return None


MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of the ELF header


def platform_of(path: Path) -> str:
    """What a library is built for, by its own header: `linux-x86_64`, or what else it is in words."""
    with path.open("rb") as file:
        header = file.read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF" or header[4:6] != b"\x02\x01":  # 64 bits, little-endian
        return "no Linux machine of 64 bits"
    (kind, machine) = struct.unpack("<HH", header[16:20])
    return f"linux-{MACHINES.get(machine, f'machine-{machine}')}" if kind == 3 else "something else than a library"


def sealed_copy(path: Path, sha256: str) -> Path:
    """A copy of a library in memory that nobody can change, once its digest was compared: what was digested is what is loaded.

    Raises:
        BadArtifact: the file has another digest.
    """
    data = path.read_bytes()
    if not hmac.compare_digest(hashlib.sha256(data).hexdigest(), sha256):
        raise BadArtifact(str(path), "SHA-256", "differs from the one in bundle.json")
    return _in_memory(data, path.name)


@functools.lru_cache(maxsize=4)
def _in_memory(data: bytes, name: str) -> Path:
    handle = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)  # stays open: the path is its number
    with open(handle, "wb", closefd=False) as file:
        file.write(data)
    fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return Path(f"/proc/self/fd/{handle}")


@functools.cache
def load(name: str = CPU) -> ctypes.CDLL:
    """A loaded library. Raises KernelError when it is missing or cannot be loaded."""
    path = library_path(name)
    if path is None:
        raise KernelError(f"the operator library `{name}` is not installed", hint=hint(name))
    return open_library(path, cuda=name == CUDA)


def open_library(path: Path, *, cuda: bool) -> ctypes.CDLL:
    """The library at a path, its functions declared. Raises KernelError when it does not load, or lacks one."""
    try:
        library = ctypes.CDLL(str(path))
        interface.declare_cpu(library)
        if cuda:
            interface.declare_cuda(library)
    except (OSError, AttributeError) as error:
        raise KernelError(f"the operator library `{path}` does not load: {error}", hint=hint(CUDA if cuda else CPU)) from error
    return library


def available(name: str = CPU) -> bool:
    """Whether a library is there and loads."""
    try:
        load(name)
    except KernelError:
        return False
    return True


def version() -> str:
    """The version the operator library was built as."""
    return str(load().modes_version().decode())


def isa() -> str:
    """The instruction set its CPU kernels were chosen for: `avx512_bf16`, `avx512`, `avx2` or `baseline`."""
    return str(load().modes_cpu_isa().decode())
