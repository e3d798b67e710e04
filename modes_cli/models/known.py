"""The model families that are tested, and what happens to any other: `docs/families.md` says how each is tested."""

from typing import Any

from modes_cli.errors import BadModel

# By model type; where the text model decides what the experts are, its model type follows.
FAMILIES: dict[str, str] = {
    "qwen3_vl_moe": "Qwen3-VL-MoE",
    "internvl+qwen3_moe": "InternVL3.5, Qwen3-MoE text",
    "internvl+gpt_oss": "InternVL3.5, GPT-OSS text",
    "kimi_vl": "Kimi-VL",
    "kimi_k25": "Kimi-K2.5",
    "glm4v_moe": "GLM-4V-MoE",
    "qwen3_omni_moe_thinker": "Qwen3-Omni-MoE (thinker)",
    "qwen3_5_moe": "Qwen3.5-MoE",
    "ernie4_5_vl_moe": "ERNIE-4.5-VL-MoE",
    "llama4": "Llama 4",
    "aria": "Aria",
    "qwen3_moe": "Qwen3-MoE, with `--text-only`",
}
_WITH_TEXT = frozenset(key.partition("+")[0] for key in FAMILIES if "+" in key)
# How configurations say the number of routed experts.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def key_of(config: Any) -> str:
    """What a configuration's family is called in FAMILIES."""
    kind = str(config.model_type)
    return f"{kind}+{config.get_text_config().model_type}" if kind in _WITH_TEXT else kind


def require_known(config: Any) -> None:
    """Raises BadModel if a Mixture-of-Experts model is of no tested family. Dense ones are named where blocks are sought."""
    key, text = key_of(config), config.get_text_config()
    if key in FAMILIES or not any(getattr(text, field, None) for field in _COUNTS):
        return
    raise BadModel(
        f"model type `{key}` is of no family that is tested here: {', '.join(sorted(FAMILIES))}",
        hint="`--family auto` takes it when its experts have the common shape",
    )
