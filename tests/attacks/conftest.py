"""A small bundle that each attack has for itself."""

import shutil
from pathlib import Path

import pytest

from tests.export.bundles import shared_bundle


@pytest.fixture
def bundle(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(shared_bundle(tmp_path_factory.getbasetemp()), tmp_path / "bundle"))
