"""Whether a bundle's files are what bundle.json says. Loading and `modes verify` share these checks."""

import contextlib
import hmac
import stat
from collections.abc import Iterator
from pathlib import Path

from modes_cli import files
from modes_cli.artifacts import bundle as artifact
from modes_cli.artifacts.bundle import Bundle, BundleFile
from modes_cli.errors import BadArtifact
from modes_cli.export.packing import check_packed
from modes_cli.export.thresholds import THRESHOLDS, layer_entries, read_rule
from modes_cli.export.watching import Watch, walk
from modes_cli.run_folder import read_json
from modes_cli.safetensors_header import Entry, merged, read_header

LIBRARY, CUDA_LIBRARY = "libmodes_cpu.so", "libmodes_cuda.so"  # the second where `modes export` found one
HALF_DECODER = "decoder-cuda.onnx"  # of bundles whose weights are float16 or bfloat16, as its activations
GRAPHS = ("decoder.onnx", "embedding.onnx", "vision.onnx")
WEIGHT_DTYPES = {"F32", "F16", "BF16"}


def read_bundle(folder: Path) -> Bundle:
    """bundle.json of a folder, validated.

    Raises:
        BadArtifact: missing, a link, not JSON, or a wrong, missing or unknown field.
    """
    path = folder / artifact.FILE
    require_file(path)
    bundle = read_json(path, Bundle)
    names = {file.path for file in bundle.files}
    needed = {THRESHOLDS, *(("decoder.onnx", "embedding.onnx", LIBRARY) if bundle.format == "onnx" else ())}
    if needed - names or not any(is_weights(name) for name in names):
        raise BadArtifact(str(path), "field `files`", f"does not list {', '.join(sorted(needed - names)) or 'any weights'}")
    return bundle


def is_weights(name: str) -> bool:
    """Whether a file of a bundle holds model weights."""
    return name.endswith(".safetensors") and name != THRESHOLDS


def require_file(path: Path) -> int:
    """The size of a regular file that has no other name.

    Raises:
        BadArtifact: it is missing, or something else.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise BadArtifact(
            str(path), "file", "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise BadArtifact(
            str(path), "file", "a link, not a file of its own" if stat.S_ISLNK(status.st_mode) else "not a regular file"
        )
    if status.st_nlink > 1:  # ONNX refuses such weights as well
        raise BadArtifact(
            str(path),
            "file",
            f"has {status.st_nlink} names (hard links): whoever has another one can change it after it was checked",
            hint="copy the folder; `cp -l` and `rsync --link-dest` make links",
        )
    return status.st_size


def check_size(folder: Path, file: BundleFile) -> None:
    """Raises BadArtifact if a listed file is missing, a link or behind a link, or of another size."""
    path = folder / file.path
    for parent in list(Path(file.path).parents)[:-1]:
        if (folder / parent).is_symlink():
            raise BadArtifact(str(folder / parent), "folder", "a link")
    size = require_file(path)
    if size != file.bytes:
        raise BadArtifact(str(path), f"size {size} bytes", f"bundle.json says {file.bytes}")


def check_digest(folder: Path, file: BundleFile) -> None:
    """Raises BadArtifact if a file's bytes are not those that bundle.json names."""
    try:
        found = files.sha256(folder / file.path)
    except OSError as error:
        raise BadArtifact(str(folder / file.path), "file", error.strerror or "cannot be read") from error
    if not hmac.compare_digest(found, file.sha256):
        raise BadArtifact(str(folder / file.path), "SHA-256", "differs from the one in bundle.json")


def check_extra(folder: Path, bundle: Bundle) -> None:
    """Raises BadArtifact if the folder holds anything that bundle.json does not list."""
    listed = {file.path for file in bundle.files} | {artifact.FILE}
    folders = {str(parent) for name in listed for parent in Path(name).parents}
    try:
        there = list(walk(folder))
    except OSError as error:
        raise BadArtifact(str(error.filename or folder), "file", error.strerror or "cannot be read") from error
    for path in there:
        name = path.relative_to(folder).as_posix()
        if name not in listed and not (name in folders and not path.is_symlink()):
            raise BadArtifact(str(path), "file", "not listed in bundle.json")


def weight_headers(folder: Path, bundle: Bundle) -> dict[str, Entry]:
    """All weights by name, headers checked.

    Raises:
        BadArtifact: a header that the format forbids, a dtype that no runtime takes, a name in two files, weights that are
            not aligned to their elements, or quantised ones whose scales do not fit them.
    """
    headers = [read_header(folder / file.path) for file in bundle.files if is_weights(file.path)]
    tensors = merged(headers)
    packed = check_packed(tensors, bundle, folder)
    for entry in tensors.values():
        if entry.dtype not in WEIGHT_DTYPES and entry.name not in packed:
            raise BadArtifact(
                str(entry.file),
                f"tensor `{entry.name}`",
                f"dtype `{entry.dtype}` is not one of {', '.join(sorted(WEIGHT_DTYPES))}",
            )
        if entry.start % 4:
            raise BadArtifact(
                str(entry.file), f"tensor `{entry.name}`", f"begins at offset {entry.start}, which is not aligned"
            )
    return tensors


def graph_weights(folder: Path, bundle: Bundle) -> dict[str, Entry]:
    """What a bundle's graphs may refer to: all weights, and layer by layer the tensors of the rule's formula."""
    return weight_headers(folder, bundle) | layer_entries(folder)


def check_for_loading(folder: Path) -> Bundle:
    """Everything but the digests of the weights, whose sizes and headers are checked instead, so that 60 GB load at once.

    Raises:
        BadArtifact: something does not hold; nothing was loaded.
    """
    bundle = read_bundle(folder)
    for file in bundle.files:
        check_size(folder, file)
        if not is_weights(file.path):
            check_digest(folder, file)
    check_extra(folder, bundle)  # transformers would take an adapter, a template or code that merely lies there
    weight_headers(folder, bundle)
    read_rule(folder, bundle)
    return bundle


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[Bundle]:
    """A bundle that was checked for loading, to be loaded in the block. What is then made of it counts only if nothing in the
    folder has changed since before the check.

    Raises:
        BadArtifact: as `check_for_loading`, or something has changed meanwhile.
    """
    watch = Watch(folder)
    yield check_for_loading(folder)
    watch.require_unchanged()
