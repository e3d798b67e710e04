"""What an artifact made now would be made from, worked out before any weights are loaded."""

from dataclasses import dataclass
from typing import Any

from modes_cli.artifacts.base import DataInfo, ModelInfo, Versions, flatten
from modes_cli.data.sample import SampleSource
from modes_cli.models.known import require_known
from modes_cli.models.loading import describe, versions
from modes_cli.requests import ModelSpec
from modes_cli.run_folder import RunFolder

Options = dict[str, Any]


@dataclass(frozen=True)
class Identity:
    """Model, data, options and versions. `flat` is what artifacts are compared by."""

    model: ModelInfo
    data: DataInfo
    options: Options
    versions: Versions

    @property
    def flat(self) -> dict[str, Any]:
        return flatten(self.model, self.data, self.versions, self.options)

    def renew(self, command: str, run: RunFolder) -> str:
        """The command that replaces an artifact made from something else."""
        model = f" {self.model.id}" if command in ("profile", "calibrate") else ""
        return f"modes {command}{model}{run.option} --fresh"


def identity(spec: ModelSpec, source: SampleSource, options: Options) -> Identity:
    """Raises BadModel if the checkpoint cannot be found or read, or its family is not a known one and has to be."""
    _, info, config = describe(spec)
    if spec.family == "known":
        require_known(config)
    return Identity(info, data_info(source), options, versions())


def data_info(source: SampleSource) -> DataInfo:
    return DataInfo(
        source=source.spec.source, split=source.spec.split, samples=len(source), seed=source.spec.seed, digest=source.digest
    )
