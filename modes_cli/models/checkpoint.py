"""Where a checkpoint's files are and what identifies them, before anything is loaded."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from modes_cli import files
from modes_cli.errors import BadArtifact, BadModel
from modes_cli.requests import ModelSpec
from modes_cli.safetensors_header import parse_header

REFERENCE = "digits"
REFERENCE_FOLDER = Path(__file__).parent.parent / "reference"
SETTINGS_LIMIT = 256 << 20  # bytes; the largest is the tokenizer's, tens of megabytes
_SETTINGS = ("generation_config.json", "tokenizer*.json", "*processor_config.json", "*.index.json")
INDEX = "model.safetensors.index.json"
# Never the pickled weights (*.bin, *.pt) that some repositories hold beside the safe ones.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


def checkpoint_folder(spec: ModelSpec, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint, downloading it if `spec.id` is a hub id.

    Raises:
        BadModel: no such folder or id, no configuration, no safetensors weights.
    """
    if spec.id == REFERENCE:
        folder = REFERENCE_FOLDER
    elif spec.id and Path(spec.id).is_dir():
        folder = Path(spec.id)
    elif spec.id.startswith((".", "/", "~")) or spec.id.count("/") > 1 or not spec.id:
        raise BadModel(f"`{spec.id}` is no folder", hint="give a Hugging Face id, a checkpoint folder, or `digits`")
    else:
        folder = _download(spec, weights)
    if not (folder / "config.json").is_file():
        raise BadModel(f"`{folder}` has no config.json", hint="give the folder that `save_pretrained` wrote")
    if weights and not list(folder.glob("*.safetensors")):
        raise BadModel(
            f"`{folder}` has no .safetensors weights",
            hint="pickled weights are not loaded; convert them with `save_pretrained`",
        )
    return folder


def _download(spec: ModelSpec, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = HUB_PATTERNS if weights else [p for p in HUB_PATTERNS if p != "*.safetensors"]
    if spec.trust_remote_code:
        patterns = [*patterns, "*.py"]
    try:
        return Path(snapshot_download(spec.id, revision=spec.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadModel(
            f"`{spec.id}` is neither a folder nor a model that can be fetched: {reason}",
            hint="check the id, `--revision`, the network and `HF_TOKEN`; or give a folder",
        ) from error


def checkpoint_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: those its index names, or the only one.

    Raises:
        BadModel: there are several and no index says which belong together.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(files.read_text(index, SETTINGS_LIMIT))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise BadModel(f"`{index}` is no index of weights") from error
        paths = [folder / str(name) for name in names if Path(str(name)).name == name]
        if len(paths) != len(names) or not paths:
            raise BadModel(f"`{index}` names files outside its folder, or none")
    else:
        paths = [folder / "model.safetensors"]
    for path in paths:
        if not os.path.isfile(path):  # also of a name that no file can have
            raise BadModel(f"`{path}` does not exist", hint="is the checkpoint complete?")
    return paths


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is.

    Raises:
        BadArtifact: not JSON, or not an object.
    """
    return _read_object(folder / "config.json")


def check_settings(folder: Path) -> None:
    """Raises BadArtifact if a settings file is damaged: transformers uses its own defaults instead of some of them."""
    for path in sorted({path for pattern in _SETTINGS for path in folder.glob(pattern)}):
        _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(files.read_text(path, SETTINGS_LIMIT))
    except (ValueError, RecursionError) as error:
        raise BadArtifact(str(path), "content", f"not JSON: {error}", hint="fetch it again") from error
    if not isinstance(found, dict):
        raise BadArtifact(str(path), "content", "not an object", hint="fetch it again")
    return found


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over config.json and over the name, size and header of every weight file.

    Headers name every tensor with shape and place, so a changed checkpoint of another shape or order is noticed without
    reading 60 GB; a change of the values alone is not.
    """
    digest = hashlib.sha256()
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(_header(path))
    return digest.hexdigest()


def _header(path: Path) -> bytes:
    if not path.is_file():  # a pipe would make us wait
        raise BadArtifact(str(path), "file", "not a regular file")
    header = parse_header(path, path.stat().st_size)  # the library that will load it names neither file nor offset
    with path.open("rb") as file:
        return file.read(header.data_start)[8:]
