"""onnxruntime-genai with the decoder graph in float16 and GroupQueryAttention, on the CPU: the built-in model, whose float32
weights were narrowed on export, against transformers with the same thresholds in float32.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from modes_cli.data import open_source
from modes_cli.data.sample import DataSpec, Sample
from modes_cli.export import export_bundle
from modes_cli.export.verify import verify_bundle
from modes_cli.models.loading import Loaded
from modes_cli.requests import ExportRequest
from modes_cli.skipping.engine import SkipEngine
from tests.export.bundles import make_run
from tests.once import once

pytest.importorskip("onnxruntime_genai", reason="`pip install onnxruntime-genai-cuda` beside onnxruntime-gpu")

from tests.runtime.genai_run import Genai, ask_transformers
from tests.runtime.test_genai import QUESTIONS, SHARES, TAU, rule

GRAPH = "decoder-cuda-0.3.onnx"
BATCH = 10


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        run = make_run(folder / "run", "digits", TAU, SHARES, experts=32, top_k=8, dtype="float16")
        export_bundle(ExportRequest(run=run))

    return once(tmp_path_factory.getbasetemp(), "digits-genai-float16", make) / "run" / "bundle"


@pytest.fixture(scope="module")
def questions() -> list[Sample]:
    return list(open_source(DataSpec("digits", "test", QUESTIONS, 0), text_only=False))


@pytest.mark.parametrize(("graph", "tau"), [(GRAPH, TAU), ("decoder-cuda-0.onnx", None)])
def test_answers_of_transformers(
    bundle: Path, digits: Loaded, questions: list[Sample], graph: str, tau: dict[str, float] | None
) -> None:
    """In one buffer for past and present; one question at a time, and in batches with padding at the left."""
    engine = SkipEngine(digits.model, digits.blocks, digits.tokens)
    try:
        engine.rule = None if tau is None else rule(tau)
        expected = ask_transformers(digits, questions)
    finally:
        engine.remove()
    asked = Genai(bundle, graph, share=True)
    assert [asked.answer(sample) for sample in questions] == expected
    batches = [questions[start : start + BATCH] for start in range(0, QUESTIONS, BATCH)]
    assert all(len({len(sample.question) for sample in batch}) > 1 for batch in batches)
    assert [row for batch in batches for row in asked.generate(asked.together(batch), BATCH)[0]] == expected


def test_one_buffer_changes_nothing(bundle: Path, questions: list[Sample]) -> None:
    apart, shared, wide = Genai(bundle, GRAPH), Genai(bundle, GRAPH, share=True), Genai(bundle)
    for batch in ([questions[0]], questions[:4]):
        (_, one), (_, other), (_, exact) = (
            model.generate(model.together(batch), len(batch)) for model in (apart, shared, wide)
        )
        np.testing.assert_array_equal(one, other)
        assert (one != exact).any()  # float16 it is


def test_what_the_bundle_says(bundle: Path) -> None:
    assert json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "decoder-0.3.onnx"
    checks = verify_bundle(bundle)
    assert [check for check in checks if not check.ok] == []
    assert {"decoder-cuda-0.onnx", "decoder-cuda-0.1.onnx", GRAPH} <= {check.name for check in checks}
