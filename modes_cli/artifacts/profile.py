"""profile.json: what `modes profile` found in a model."""

from typing import ClassVar

from pydantic import Field, model_validator

from modes_cli.artifacts.base import Artifact, Count, Finite, NonNegative, Positive, Strict
from modes_cli.artifacts.semantics import ROUNDING, require_rising, require_some_of


class LayerProfile(Strict):
    """One MoE layer. Entropy is of expert use divided by its maximum, log E: 1 means all experts are used equally."""

    layer: Count
    expert_usage_entropy: dict[str, Finite]  # per modality, 0..1
    update_angle: dict[str, Finite]  # degrees between a token's residual stream before and after the MoE block, mean
    pi_top1: dict[str, Finite]  # mean share of the largest of the top-k weights
    seconds: NonNegative


class Profile(Artifact):
    FILE: ClassVar[str] = "profile.json"
    COMMAND: ClassVar[str] = "profile"

    family: str
    moe_layers: Positive
    experts: Positive
    top_k: Positive
    hidden_size: Positive
    expert_intermediate_size: Positive
    parameters: Positive
    expert_parameters: Positive
    layers: list[LayerProfile] = Field(min_length=1)
    tokens: dict[str, Count]

    @model_validator(mode="after")
    def _holds_together(self) -> "Profile":
        require_some_of("top_k", self.top_k, "experts", self.experts)
        require_some_of("expert_parameters", self.expert_parameters, "parameters", self.parameters)
        if len(self.layers) != self.moe_layers:
            raise ValueError(f"there are {len(self.layers)} layers, moe_layers is {self.moe_layers}")
        require_rising("layers", [layer.layer for layer in self.layers])
        for layer in self.layers:
            for name, most in (("expert_usage_entropy", 1.0), ("update_angle", 180.0), ("pi_top1", 1.0)):
                for group, value in getattr(layer, name).items():
                    if not -ROUNDING <= value <= most + ROUNDING:
                        raise ValueError(f"{name} of `{group}` in layer {layer.layer} is {value!r}, outside 0..{most:g}")
        return self
