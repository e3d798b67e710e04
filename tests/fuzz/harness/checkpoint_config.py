"""config.json of a checkpoint: our reading of it, transformers', and what we take from the outcome."""

import shutil

from modes_cli.models.checkpoint import REFERENCE_FOLDER
from modes_cli.models.loading import describe
from modes_cli.requests import ModelSpec
from tests.fuzz.mutate import as_json as mutate
from tests.fuzz.places import real, scratch

__all__ = ["mutate", "one", "seeds"]


def seeds() -> list[bytes]:
    return [real("checkpoint", "config.json").read_bytes(), (REFERENCE_FOLDER / "config.json").read_bytes()]


def one(data: bytes) -> None:
    folder = scratch("config")
    if not any(folder.iterdir()):
        shutil.copytree(real("checkpoint"), folder, dirs_exist_ok=True)
        (folder / "tokenizer.json").write_text("{}")  # looked at by `check_settings` alone, and large
    (folder / "config.json").write_bytes(data)
    describe(ModelSpec(str(folder), device="cpu"))
