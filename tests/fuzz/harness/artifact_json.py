"""Artifacts: profile, calibration, thresholds, evaluation, bench, bundle.json. What is taken is written and read the same."""

from modes_cli import files, run_folder
from modes_cli.artifacts import SCHEMAS
from modes_cli.errors import ModesError
from tests import examples
from tests.fuzz.mutate import as_json as mutate
from tests.fuzz.places import scratch

__all__ = ["mutate", "one", "seeds"]


def seeds() -> list[bytes]:
    return [examples.path(name).read_bytes() for name in SCHEMAS]


def one(data: bytes) -> None:
    path = scratch("artifact") / "artifact.json"
    path.write_bytes(data)
    refused = []
    for kind in SCHEMAS.values():
        try:
            found = run_folder.read_json(path, kind)
        except ModesError as error:
            refused.append(error)
            continue
        again = path.with_name("again.json")
        again.write_bytes(files.canonical_json(found.model_dump(mode="json")).encode())
        assert run_folder.read_json(again, kind) == found, "what was read is not what is written"
    if len(refused) == len(SCHEMAS):
        raise refused[0]
