"""Tiny models of several families, made once; tests leave them as they were."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from transformers import PreTrainedModel

from modes_cli.models.blocks import MoEBlock, find_moe_blocks
from modes_cli.models.groups import TokenGroups
from modes_cli.skipping.engine import SkipEngine
from tests.families import FAMILIES, TOKENS, Inputs


@dataclass(frozen=True)
class Subject:
    """A model to skip in, and inputs for it."""

    model: Any
    inputs: Inputs
    blocks: list[MoEBlock]

    @property
    def inner(self) -> Any:
        """The model that owns the experts; wrapper classes refuse to have the implementation set."""
        return next(m for m in self.model.modules() if isinstance(m, PreTrainedModel) and m._can_set_experts_implementation())

    @contextmanager
    def engine(self, tokens: TokenGroups = TOKENS, *, use_operator: bool = True) -> Iterator[SkipEngine]:
        engine = SkipEngine(self.model, self.blocks, tokens)
        engine.use_operator = use_operator
        try:
            yield engine
        finally:
            engine.remove()

    @contextmanager
    def implementation(self, name: str) -> Iterator[None]:
        before = self.inner.config._experts_implementation
        self.inner.set_experts_implementation(name)
        try:
            yield
        finally:
            self.inner.set_experts_implementation(before)


def make(family: str) -> Subject:
    model, inputs = FAMILIES[family]()
    return Subject(model, inputs, find_moe_blocks(model))


@pytest.fixture(scope="session")
def subject(one_thread: None) -> Callable[[str], Subject]:
    """`subject(family)`: always the same one."""
    return cache(make)


@pytest.fixture
def qwen(subject: Callable[[str], Subject]) -> Subject:
    return subject("qwen3_vl_moe")
