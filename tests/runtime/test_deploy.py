"""The programs of docs/deploy.md, as they stand there. The C++ ones need headers that no wheel has."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modes_cli.runtime.ort_model import OrtModel
from modes_cli.skipping.policy import tau_vector
from tests.export.bundles import shared_bundle

PROGRAMS = Path(__file__).parents[2] / "docs" / "deploy"
IDS = (1, 300, 205, 20, 60, 2, 205, 1, 301, 205)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_bundle(tmp_path_factory.getbasetemp())


def run_program(program: str, *arguments: object) -> str:
    command = [sys.executable, str(PROGRAMS / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_next_token(bundle: Path) -> None:
    model = OrtModel(bundle, threads=1)
    ids = np.array([IDS])
    positions = np.tile(np.arange(len(IDS)), (3, 1, 1))
    found = set()
    for tau in (0.0, 0.05):
        state, vector = model.empty_state(1), tau_vector({"text": tau, "vision": tau}).numpy()
        model.step(state, ids, np.ones_like(ids), positions, np.zeros_like(model._no_features), vector)
        token, logit, kept, *_ = run_program("next_token.py", bundle, tau, *IDS).split()
        assert int(token) == state.logits[0, -1].argmax()
        assert float(logit) == pytest.approx(float(state.logits.max()), abs=2e-4)
        assert int(kept) == state.kept.sum()
        found.add(kept)
    assert len(found) == 2  # tau was taken
