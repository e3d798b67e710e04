"""What differs from one model family to the next when a graph is exported: one adapter per file, one line in FAMILIES."""

from modes_cli.errors import UnknownLayout
from modes_cli.export.families.base import Family
from modes_cli.export.families.qwen3_vl_moe import Qwen3VLMoe

FAMILIES: dict[str, Family] = {"qwen3_vl_moe": Qwen3VLMoe()}

__all__ = ["FAMILIES", "Family", "family_of"]


def family_of(model_type: str) -> Family:
    """The adapter of a model type.

    Raises:
        UnknownLayout: graphs of this family cannot be exported yet.
    """
    if model_type not in FAMILIES:
        raise UnknownLayout(
            f"graphs of model type `{model_type}` cannot be exported yet; known are {', '.join(sorted(FAMILIES))}",
            hint="`--format safetensors` writes weights and thresholds for PyTorch",
        )
    return FAMILIES[model_type]
