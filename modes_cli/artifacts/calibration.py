"""calibration.json: layer importance (MoDES eq. 2). Routing scores and reference distributions: calibration.safetensors."""

import re
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from modes_cli.artifacts.base import Artifact, Count, NonNegative, Positive, Strict, TensorFile
from modes_cli.artifacts.semantics import require_known, require_once, require_rising, require_some_of

SUM_TOLERANCE = 1e-6
LAYER = re.compile(r"0|[1-9][0-9]{0,5}")  # a decoder layer's number, as a key
# Of pixels and question: the first 64 bits of a SHA-256, to tell whether `evaluate` scores what was calibrated on.
SampleDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class LayerImportance(Strict):
    """Shares of the summed damage: over the layers, each column sums to 1.

    `all`: every token loses the layer's routed experts; `text`, `vision`: only that modality's tokens do; `prompt`, `decode`:
    only text tokens before those that predict the answer, or only these. `kl_*` is the damage itself, mean
    KL(p_full || p_without) over answer tokens, in nats.
    """

    all: NonNegative
    text: NonNegative
    vision: NonNegative
    prompt: NonNegative
    decode: NonNegative
    kl_all: NonNegative
    kl_text: NonNegative
    kl_vision: NonNegative
    kl_prompt: NonNegative
    kl_decode: NonNegative


class Calibration(Artifact):
    FILE: ClassVar[str] = "calibration.json"
    COMMAND: ClassVar[str] = "calibrate"

    family: str
    moe_layers: Positive
    experts: Positive
    top_k: Positive
    groups: list[str] = Field(min_length=1)
    importance: dict[str, LayerImportance]
    tokens: dict[str, Count]  # per group, padding left out
    answer_tokens: Positive
    samples: Positive
    forward_equivalents: NonNegative
    naive_forwards: NonNegative
    tensors: TensorFile
    sample_digests: list[SampleDigest] | None = None  # in order; files of earlier versions have none

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> "Calibration":
        if len(self.importance) != self.moe_layers:
            raise ValueError(f"importance has {len(self.importance)} layers, moe_layers is {self.moe_layers}")
        for column in ("all", "text", "vision", "prompt", "decode"):
            total = sum(getattr(layer, column) for layer in self.importance.values())
            if total != 0 and abs(total - 1.0) > SUM_TOLERANCE:
                raise ValueError(f"importance `{column}` sums to {total!r}, not 1")
        if self.sample_digests is not None and len(self.sample_digests) != self.samples:
            raise ValueError(f"sample_digests has {len(self.sample_digests)} entries, samples is {self.samples}")
        if sum(layer.all for layer in self.importance.values()) == 0:
            raise ValueError("importance is 0 in every layer")
        return self

    @model_validator(mode="after")
    def _holds_together(self) -> "Calibration":
        if wrong := [layer for layer in self.importance if not LAYER.fullmatch(layer)]:
            raise ValueError(f"importance names `{wrong[0][:80]}`, which is no layer")
        require_rising("layers of importance", [int(layer) for layer in self.importance])
        require_some_of("top_k", self.top_k, "experts", self.experts)
        require_once("groups", self.groups)
        require_known("tokens", self.tokens, self.groups)
        if self.samples != self.data.samples:
            raise ValueError(f"samples is {self.samples}, data.samples {self.data.samples}")
        return self
