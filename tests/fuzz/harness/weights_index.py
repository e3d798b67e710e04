"""model.safetensors.index.json, of a checkpoint and of a bundle."""

import json
import shutil

from modes_cli.artifacts import Bundle
from modes_cli.errors import ModesError
from modes_cli.export import verify
from modes_cli.export.integrity import read_bundle
from modes_cli.models.checkpoint import INDEX, check_settings, checkpoint_files
from tests.fuzz.mutate import as_json as mutate
from tests.fuzz.places import real, scratch

__all__ = ["mutate", "one", "seeds"]

_bundles: list[Bundle] = []


def seeds() -> list[bytes]:
    several = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    return [json.dumps(several).encode(), real("bundle", INDEX).read_bytes()]


def one(data: bytes) -> None:
    folder = scratch("index")
    if not _bundles:
        shutil.copytree(real("bundle"), folder, dirs_exist_ok=True)
        for name in ("model-1.safetensors", "model-2.safetensors"):
            (folder / name).touch()
        _bundles.append(read_bundle(folder))
    (folder / INDEX).write_bytes(data)
    refused = None
    for check in (
        lambda: checkpoint_files(folder),
        lambda: check_settings(folder),
        lambda: verify._weights(folder, _bundles[0], {}),
    ):
        try:
            check()
        except ModesError as error:
            refused = error
    if refused is not None:
        raise refused
