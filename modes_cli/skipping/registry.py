"""Policies by name."""

from typing import Any

import modes_cli.skipping.policies  # noqa: F401  each module registers its policy
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadOption
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import REGISTRY, Policy, Rule


def policy(name: str, **parameters: Any) -> Policy:
    """A policy by name.

    Raises:
        BadOption: no such policy.
    """
    if name not in REGISTRY:
        raise BadOption(f"no policy `{name}`", hint=f"policies are auto, {', '.join(policy_names())}")
    return REGISTRY[name](**parameters)


def variants(name: str) -> list[Policy]:
    """A policy with each of the parameters that a search tries. Raises BadOption as `policy`."""
    return [policy(name, **parameters) for parameters in type(policy(name)).variants]


def automatic_policies(first: str) -> list[Policy]:
    """Variants of all that `auto` tries, by name, those of `first` at the beginning."""
    names = sorted((name for name, kind in REGISTRY.items() if kind.automatic), key=lambda name: (name != first, name))
    return [one for name in names for one in variants(name)]


def policy_names() -> list[str]:
    return sorted(REGISTRY)


def from_result(result: SearchResult, measured: Measured) -> Rule:
    """The rule that a search result stands for."""
    return policy(result.policy, **result.parameters).rule(measured, result.tau)
