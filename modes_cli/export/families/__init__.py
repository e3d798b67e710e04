"""What differs from one model family to the next when a graph is exported: one adapter per file, one line in FAMILIES."""

from typing import Any

from modes_cli.errors import UnknownLayout
from modes_cli.export.families.base import Family
from modes_cli.export.families.internvl import InternVL
from modes_cli.export.families.internvl_gpt_oss import InternVLGptOss
from modes_cli.export.families.kimi_k25 import KimiK25
from modes_cli.export.families.kimi_vl import KimiVL
from modes_cli.export.families.qwen3_vl_moe import Qwen3VLMoe

# By model type; where a model can have text models of several kinds, by model type + model type of the text model.
FAMILIES: dict[str, Family] = {
    "kimi_k25": KimiK25(),
    "kimi_vl": KimiVL(),
    "qwen3_vl_moe": Qwen3VLMoe(),
    "internvl+qwen3_moe": InternVL(),
    "internvl+gpt_oss": InternVLGptOss(),
}

__all__ = ["FAMILIES", "Family", "family_of", "known_family"]


def known_family(config: Any) -> Family | None:
    """The adapter for a model's configuration, or None."""
    return FAMILIES.get(config.model_type) or FAMILIES.get(f"{config.model_type}+{config.get_text_config().model_type}")


def family_of(config: Any) -> Family:
    """The adapter for a model's configuration.

    Raises:
        UnknownLayout: graphs of this family cannot be exported yet.
    """
    family = known_family(config)
    if family is None:
        text = config.get_text_config().model_type
        raise UnknownLayout(
            f"graphs of model type `{config.model_type}` with text model `{text}` cannot be exported yet; "
            f"known are {', '.join(sorted(FAMILIES))}",
            hint="`--format safetensors` writes weights and thresholds for PyTorch",
        )
    return family
