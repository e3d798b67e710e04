"""Where artifacts live. Reads validate before anything is used; writes are all or nothing."""

import hashlib
import os
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from modes_cli import files, strict_json
from modes_cli.artifacts.base import Artifact, Strict, TensorFile, first_difference
from modes_cli.errors import BadArtifact, MissingArtifact, StaleArtifact

JSON_LIMIT = 64 << 20  # bytes; the largest artifact of a 1,000-layer model is far below
DEFAULT = "modes-run"

A = TypeVar("A", bound=Artifact)
S = TypeVar("S", bound=Strict)


def read_json(path: Path, model: type[S]) -> S:
    """A validated artifact from a JSON file.

    Raises:
        BadArtifact: too large, not UTF-8, not JSON, a wrong, missing, unknown or repeated field. Names the place.
    """
    tree = strict_json.read(path, JSON_LIMIT)
    try:
        return model.model_validate(tree, strict=True)  # `"16"` is no number, and 16.5 no count
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise BadArtifact(str(path), f"field `{field}`", str(first["msg"])) from error


class RunFolder:
    """A folder of artifacts. `path` None means `$MODES_RUN`, or `modes-run`."""

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path or os.environ.get("MODES_RUN") or DEFAULT)

    def file(self, name: str) -> Path:
        return self.path / name

    def exists(self, kind: type[Artifact]) -> bool:
        return self.file(kind.FILE).exists()

    def read(self, kind: type[A], *, renew: str | None = None) -> A:
        """The validated artifact of one kind.

        Raises:
            MissingArtifact: the step that makes it has not been run here.
            BadArtifact: the file does not hold what it must.
        """
        path = self.file(kind.FILE)
        if not path.exists() and not path.is_symlink():
            raise MissingArtifact(str(path), renew or self.renew(kind))
        try:
            return read_json(path, kind)
        except BadArtifact as error:
            error.hint = f"make it again: `{self.renew(kind)} --fresh`"
            raise

    def read_if_same(self, kind: type[A], identity: dict[str, Any], *, renew: str) -> A | None:
        """The artifact if it is there and was made from exactly `identity`; None if it is not there.

        Raises:
            StaleArtifact: it is there, made from something else. `renew` is the command that replaces it.
        """
        if not self.exists(kind):
            return None
        artifact = self.read(kind)
        self.require_same(kind, artifact.identity(), identity, renew=renew)
        return artifact

    def require_same(self, kind: type[Artifact], found: dict[str, Any], expected: dict[str, Any], *, renew: str) -> None:
        """Raises StaleArtifact, naming the first field in which two identities differ."""
        difference = first_difference(found, expected)
        if difference is not None:
            raise StaleArtifact(str(self.file(kind.FILE)), *difference, renew)

    @property
    def option(self) -> str:
        """How to name this folder on a command line, with a leading space; empty for the default one."""
        return "" if str(self.path) == DEFAULT else f" --run {self.path}"

    def renew(self, kind: type[Artifact]) -> str:
        """The command that makes an artifact in this folder."""
        argument = " MODEL" if kind.COMMAND in ("profile", "calibrate") else ""
        return f"modes {kind.COMMAND}{argument}{self.option}"

    def write(self, artifact: Artifact) -> Path:
        """Write an artifact under its file name; the same content gives the same bytes. What nobody could read is refused."""
        path, tree = self.file(artifact.FILE), artifact.model_dump(mode="json")
        type(artifact).model_validate(tree, strict=True)
        files.write_bytes(path, files.canonical_json(tree).encode())
        return path

    def write_tensors(self, name: str, data: bytes, kind: type[Artifact]) -> TensorFile:
        """Write the safetensors file of an artifact. Write it before the artifact: JSON is the commit.

        An artifact of that kind that is there goes first: killed after this, it would name tensors that are no more.
        """
        path = self.file(name)
        digest = hashlib.sha256(data).hexdigest()
        if path.exists() and files.sha256(path) != digest:
            files.remove(self.file(kind.FILE))
        files.write_bytes(path, data)
        return TensorFile(file=name, sha256=digest, bytes=len(data))

    def check_tensors(self, ref: TensorFile, kind: type[Artifact]) -> Path:
        """The path of an artifact's tensor file after comparing size and digest.

        Raises:
            BadArtifact: missing, truncated or altered.
        """
        path = self.file(ref.file)
        again = f"make it again: `{self.renew(kind)} --fresh`"
        if not path.is_file():
            raise BadArtifact(str(path), "file", "not a file" if path.exists() else "missing", hint=again)
        if path.stat().st_size != ref.bytes:
            raise BadArtifact(str(path), f"size {path.stat().st_size} bytes", f"should be {ref.bytes}", hint=again)
        if files.sha256(path) != ref.sha256:
            raise BadArtifact(str(path), "SHA-256", "differs from what was written", hint=again)
        return path
