"""bundle.json: what a bundle is, and the SHA-256 of everything in it."""

from typing import Literal

from pydantic import Field, model_validator

from modes_cli.artifacts.base import Count, DataInfo, ModelInfo, NonNegative, Positive, Ratio, Sha256, Strict, Versions

FILE = "bundle.json"


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
        paths = [file.path for file in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("a file is listed twice")
        if set(self.tau) - set(self.groups):
            raise ValueError(f"tau names {sorted(set(self.tau) - set(self.groups))}, which are no groups")
        return self
