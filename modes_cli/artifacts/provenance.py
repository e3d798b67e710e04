"""What a bundle was made from, and by what: the part `provenance` of bundle.json."""

from typing import Annotated

from pydantic import Field

from modes_cli.artifacts.base import Sha256, Strict

Options = dict[str, str | int | float | bool | None]
Commit = Annotated[str, Field(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]
Platform = Annotated[str, Field(pattern=r"^[a-z0-9]+-[A-Za-z0-9_.\-]+$")]  # of Python's sysconfig: `linux-x86_64`


class Source(Strict):
    """The git checkout that the tool ran from. `dirty`: its code differed from that commit."""

    commit: Commit
    dirty: bool


class KernelLibrary(Strict):
    """An operator library of the bundle, and the platform that it was built for."""

    file: FileName
    platform: Platform
    sha256: Sha256


class Provenance(Strict):
    """`calibration`, `thresholds`: SHA-256 of calibration.json and thresholds.json, and the options of the commands that
    wrote them. `export_options`: those of `modes export`; target and thresholds stand in the bundle itself. `libraries`:
    versions of what decides a bundle's bytes beside `versions`. `source`: None where the tool did not run from a git checkout.
    """

    calibration: Sha256
    calibration_options: Options
    thresholds: Sha256
    search_options: Options
    export_options: Options
    kernels: list[KernelLibrary]
    libraries: dict[str, str]
    source: Source | None
