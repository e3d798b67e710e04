"""What tests of several folders share: tiny random checkpoints and the built-in model, made or loaded once.

Heavy libraries are imported where they are used, so that tests that need none of them stay quick.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.once import once

if TYPE_CHECKING:
    from modes_cli.data.sample import Sample
    from modes_cli.models.loading import Loaded


# The files that take longest, from the longest on: who begins one of them last would work alone in the end.
LONGEST = (
    "export/test_kimi.py",
    "cli/test_killed.py",
    "export/test_internvl.py",
    "kernels/test_isa.py",
    "ci/test_pipeline.py",
    "cuda/test_emulator.py",
    "distributed/test_several.py",
    "test_families.py",
)

# Examples are quick, but not on a machine that does something else at the same time. They are the same each time, so that what
# fails is from a change; `pytest -m hypothesis --hypothesis-profile=new` looks for new ones.
settings.register_profile("modes", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None)
settings.load_profile("modes")
# What is computed here is too small to be worth a second thread. Read by torch when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where a test asks for two: no spinning for a core that is not free


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first where several processes share the work; one process goes by the alphabet."""
    if hasattr(config, "workerinput"):
        rank = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """These models are too small for more, and other work may be running."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A Qwen3-VL-MoE folder with random weights: a dense layer and three of 16 experts, 4 for each token."""
    from tests.checkpoints import write_moe

    return once(tmp_path_factory.getbasetemp(), "checkpoint-tiny", write_moe)


@pytest.fixture(scope="session")
def tiny_dense_checkpoint(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A Qwen3-VL folder: images, no experts."""
    from tests.checkpoints import write_dense

    return once(tmp_path_factory.getbasetemp(), "checkpoint-dense", write_dense)


@pytest.fixture(scope="session")
def tiny_text_moe_checkpoint(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A Qwen3-MoE folder: experts, no images."""
    from tests.checkpoints import write_text_moe

    return once(tmp_path_factory.getbasetemp(), "checkpoint-text-moe", write_text_moe)


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path) -> Loaded:
    """The tiny checkpoint in memory, shared: whoever installs an engine removes it."""
    from modes_cli.models.loading import load
    from modes_cli.requests import ModelSpec

    return load(ModelSpec(str(tiny_checkpoint), device="cpu"))


@pytest.fixture(scope="session")
def digits(one_thread: None) -> Loaded:
    """The built-in trained model in memory, shared: whoever installs an engine removes it."""
    from modes_cli.models.loading import load
    from modes_cli.requests import ModelSpec

    return load(ModelSpec("digits", device="cpu"))


@pytest.fixture(scope="session")
def small_samples() -> Callable[..., list[Sample]]:
    """`small_samples(count, seed=0, text_only=False)`: the first DigitsVQA samples of the validation split."""
    from tests.checkpoints import small_samples as take

    return take
