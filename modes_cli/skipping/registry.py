"""Policies by name."""

from typing import Any

import modes_cli.skipping.policies  # noqa: F401  each module registers its policy
from modes_cli.artifacts import Calibration
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadOption
from modes_cli.skipping.policy import REGISTRY, Policy, Rule


def policy(name: str, **parameters: Any) -> Policy:
    """A policy by name.

    Raises:
        BadOption: no such policy.
    """
    if name not in REGISTRY:
        raise BadOption(f"no policy `{name}`", hint=f"policies are auto, {', '.join(policy_names())}")
    return REGISTRY[name](**parameters)


def policy_names() -> list[str]:
    return sorted(REGISTRY)


def from_result(result: SearchResult, calibration: Calibration) -> Rule:
    """The rule that a search result stands for."""
    return policy(result.policy, **result.parameters).rule(calibration, result.tau)
