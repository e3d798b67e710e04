"""What every artifact file has in common: strict fields, what it was made from, and how two of those are compared."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
LARGEST = 1 << 53  # every smaller integer survives a reader of JSON that has only doubles
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
Dtype = Literal["float32", "bfloat16", "float16"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Unknown fields are refused: a typing error in a hand-edited file must not pass as a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelInfo(Strict):
    """Which checkpoint: `digest` is over its configuration and the headers and sizes of its weight files."""

    id: str
    revision: str | None
    digest: Sha256
    dtype: Dtype


class DataInfo(Strict):
    """Which samples: `digest` is over ids, pixels, questions and answers of those that were used."""

    source: str
    split: str | None
    samples: Positive
    seed: int
    digest: Sha256


class Versions(Strict):
    """Numbers can differ in the last bits from one library version to the next, so these belong to an artifact's identity."""

    modes: str
    torch: str
    transformers: str


class Artifact(Strict):
    """Base of every artifact file.

    `options` holds each option that decides the content. `versions.modes` decides whether the file can be continued.
    """

    FILE: ClassVar[str]
    COMMAND: ClassVar[str]

    schema_version: Literal[1] = 1
    model: ModelInfo
    data: DataInfo
    options: dict[str, str | int | float | bool | None]
    versions: Versions

    def identity(self) -> dict[str, Any]:
        """Everything that must be equal for this file to be used instead of being made again, flat."""
        return flatten(self.model, self.data, self.versions, self.options)


def flatten(model: ModelInfo, data: DataInfo, versions: Versions, options: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as `model.id`, `data.seed`, ...: the form in which two are compared and a difference is named."""
    parts = {"model": model.model_dump(), "data": data.model_dump(), "versions": versions.model_dump(), "options": options}
    return {f"{part}.{field}": value for part, fields in parts.items() for field, value in fields.items()}


def first_difference(found: dict[str, Any], expected: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field that differs between two identities: name, found, expected. A missing field is a difference.

    Digests come last: a seed that explains why one differs says more.
    """
    for field in sorted(found.keys() | expected.keys(), key=lambda field: (field.endswith(".digest"), field)):
        missing = "(missing)"
        if found.get(field, missing) != expected.get(field, missing):
            return field, found.get(field, missing), expected.get(field, missing)
    return None


class TensorFile(Strict):
    """A safetensors file beside a JSON artifact: a plain name, never a path to somewhere else."""

    file: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")
    sha256: Sha256
    bytes: Positive
