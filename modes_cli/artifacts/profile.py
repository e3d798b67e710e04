"""profile.json: what `modes profile` found in a model."""

from typing import ClassVar

from pydantic import Field

from modes_cli.artifacts.base import Artifact, Count, Finite, NonNegative, Positive, Strict


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
