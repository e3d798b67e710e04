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


def named(text: str) -> Policy:
    """A policy as the command line names it: `tempered`, or with parameters `tempered:power=0.5,per_modality=1`.

    Raises:
        BadOption: no such policy or parameter, or a value that is no number.
    """
    name, _, given = text.partition(":")
    made = policy(name)
    parameters: dict[str, float] = {}
    for part in given.split(",") if given else ():
        key, _, value = part.partition("=")
        if key not in made.parameters:
            known = ", ".join(made.parameters) or "none"
            raise BadOption(f"policy `{name}` has no parameter `{key}`", hint=f"its parameters: {known}")
        try:
            parameters[key] = float(value)
        except ValueError:
            raise BadOption(f"`{part}` is no parameter", hint=f"for example `{name}:{key}={made.parameters[key]:g}`") from None
    return policy(name, **parameters) if parameters else made


def variants(text: str) -> list[Policy]:
    """A policy with each of the parameters that a search tries, or with those that were named. Raises BadOption as `named`."""
    made = named(text)
    return [made] if ":" in text else [policy(text, **parameters) for parameters in type(made).variants]


def automatic_policies(first: str) -> list[Policy]:
    """All that `auto` tries, policy by policy: the variants of `first`, and of the others in their order."""
    names = [name for name, kind in REGISTRY.items() if kind.automatic]
    names.sort(key=lambda name: (name != first, REGISTRY[name].automatic))
    return [one for name in names for one in variants(name)]


def policy_names() -> list[str]:
    return sorted(REGISTRY)


def from_result(result: SearchResult, measured: Measured) -> Rule:
    """The rule that a search result stands for."""
    return policy(result.policy, **result.parameters).rule(measured, result.tau)
