"""bundle.json of a folder whose files are real: everything that is looked at before a bundle is loaded."""

import shutil

from modes_cli.export.integrity import check_extra, check_for_loading
from tests.fuzz.mutate import as_json as mutate
from tests.fuzz.places import real, scratch

__all__ = ["mutate", "one", "seeds"]


def seeds() -> list[bytes]:
    return [real("bundle", "bundle.json").read_bytes()]


def one(data: bytes) -> None:
    folder = scratch("bundle")
    if not any(folder.iterdir()):
        shutil.copytree(real("bundle"), folder, dirs_exist_ok=True)
    (folder / "bundle.json").write_bytes(data)
    check_extra(folder, check_for_loading(folder))
