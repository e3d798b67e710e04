"""genai_config.json of a bundle."""

import shutil

from modes_cli.artifacts import Bundle
from modes_cli.export.genai import folder as genai
from modes_cli.export.integrity import read_bundle
from tests.fuzz.mutate import as_json as mutate
from tests.fuzz.places import real, scratch

__all__ = ["mutate", "one", "seeds"]

_bundles: list[Bundle] = []


def seeds() -> list[bytes]:
    return [real("bundle", genai.CONFIG).read_bytes()]


def one(data: bytes) -> None:
    folder = scratch("genai")
    if not _bundles:
        shutil.copytree(real("bundle"), folder, dirs_exist_ok=True)
        _bundles.append(read_bundle(folder))
    (folder / genai.CONFIG).write_bytes(data)
    genai.check(folder, _bundles[0])
