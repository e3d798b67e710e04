"""bundle.json: what a bundle is, and the SHA-256 of everything in it."""

from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field, model_validator

from modes_cli.artifacts.base import Count, DataInfo, ModelInfo, NonNegative, Positive, Ratio, Sha256, Strict, Versions
from modes_cli.artifacts.provenance import Provenance
from modes_cli.artifacts.semantics import require_known, require_once, require_rising, require_some_of

FILE = "bundle.json"
LOADED = (".onnx", ".safetensors", ".so")  # what is mapped or run, and names others by where it lies


class BundleFile(Strict):
    """One file of the bundle. `path` is relative, inside the folder, with forward slashes."""

    path: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*$")
    bytes: Count
    sha256: Sha256


class OperatingPoint(Strict):
    """One search result that the bundle can run at by feeding `tau`; the chosen one is the graph's default."""

    target: Ratio
    decode_target: Ratio | None  # as in SearchResult
    tau: dict[str, NonNegative]
    skip_ratio: Ratio
    kl: NonNegative


class DecoderInfo(Strict):
    """What a runtime must know to feed the graphs."""

    layers: Positive
    kv_heads: Positive
    head_dim: Positive
    value_dim: Positive | None = None  # of cached values, where it is not head_dim; with latent attention the rotated part
    hidden_size: Positive
    vocab_size: Positive
    deepstack: Count
    position_rows: Literal[1, 3]
    frames_together: bool = False  # whether the vision graph must see the frames of a clip together


class Quantization(Strict):
    """How the expert weights are stored: `block` of them, one after another along the input dimension, share a scale."""

    scheme: Literal["int8", "int4"]
    block: Positive


class Bundle(Strict):
    """`groups` names the rows of `tau`, in order; the last, `special`, is never skipped."""

    schema_version: Literal[1] = 1
    model: ModelInfo
    family: str
    calibration_data: DataInfo
    versions: Versions
    provenance: Provenance
    format: Literal["onnx", "safetensors"]
    quantization: Quantization | None  # of the experts; None: as everything else
    policy: str
    parameters: dict[str, float]
    groups: list[str] = Field(min_length=1)
    target: Ratio
    decode_target: Ratio | None
    tau: dict[str, NonNegative]
    points: list[OperatingPoint]
    moe_layers: list[Count] = Field(min_length=1)  # decoder layer index of each MoE layer, in order
    experts: Positive
    top_k: Positive
    vision_token_ids: list[Count]
    special_token_ids: list[Count]
    audio_token_ids: list[Count]
    eos_token_ids: list[Count]
    pad_token_id: Count
    decoder: DecoderInfo
    files: list[BundleFile] = Field(min_length=1)

    @model_validator(mode="after")
    def _files_differ(self) -> "Bundle":
        """Also where a file system takes `A` and `a` for the same, or a name would be a file and a folder."""
        if len({file.path for file in self.files}) != len(self.files):
            raise ValueError("a file is listed twice")
        taken: dict[str, str] = {}
        for path in [FILE, *(file.path for file in self.files)]:
            if (other := taken.setdefault(path.casefold(), path)) != path or (path == FILE and path in self._paths):
                raise ValueError(f"`{path}` and `{other}` are one file on some machines, or bundle.json lists itself")
        for path in taken:
            if above := next((str(parent) for parent in PurePosixPath(path).parents if str(parent) in taken), None):
                raise ValueError(f"`{taken[above]}` is a file and the folder of `{taken[path]}`")
        for path in self._paths:
            if "/" in path and path.endswith(LOADED):
                raise ValueError(f"`{path}`: graphs, weights and libraries lie in the bundle's own folder, in no other")
        return self

    @property
    def _paths(self) -> set[str]:
        return {file.path for file in self.files}

    @model_validator(mode="after")
    def _libraries_are_listed(self) -> "Bundle":
        kernels = {kernel.file: kernel.sha256 for kernel in self.provenance.kernels}
        found = {file.path: file.sha256 for file in self.files if file.path.endswith(".so")}
        if kernels != found or len(kernels) != len(self.provenance.kernels):
            raise ValueError("provenance.kernels is not the operator libraries among the files, each once with its digest")
        return self

    @model_validator(mode="after")
    def _holds_together(self) -> "Bundle":
        require_once("groups", self.groups)
        for tau in (self.tau, *(point.tau for point in self.points)):
            require_known("tau", tau, self.groups)
        keys = [(point.target, -1.0 if point.decode_target is None else point.decode_target) for point in self.points]
        if keys != sorted(set(keys)):
            raise ValueError(f"points {keys} are not in rising order, each once")
        for point in self.points:
            if point.skip_ratio < point.target:
                raise ValueError(f"points: skip_ratio {point.skip_ratio!r} is below its target {point.target!r}")
        if (self.target, self.decode_target, self.tau) not in [(p.target, p.decode_target, p.tau) for p in self.points]:
            raise ValueError("target, decode_target and tau are none of the points")
        return self

    @model_validator(mode="after")
    def _numbers_are_within_range(self) -> "Bundle":
        require_rising("moe_layers", self.moe_layers)
        require_some_of("the last of moe_layers", self.moe_layers[-1] + 1, "decoder.layers", self.decoder.layers)
        require_some_of("top_k", self.top_k, "experts", self.experts)
        for name in ("vision_token_ids", "special_token_ids", "audio_token_ids"):
            require_rising(name, getattr(self, name))
        for name, ids in (("pad_token_id", [self.pad_token_id]), ("eos_token_ids", self.eos_token_ids)):
            if wrong := [token for token in ids if token >= self.decoder.vocab_size]:
                raise ValueError(f"{name} has {wrong[0]}; the vocabulary has {self.decoder.vocab_size} tokens")
        return self
