"""onnxruntime-genai, the released package, runs the bundle's folder as it is: skipping included, token by token as
transformers does.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from modes_cli.data import open_source
from modes_cli.data.sample import DataSpec, Sample
from modes_cli.export import export_bundle
from modes_cli.export.verify import verify_bundle
from modes_cli.models.groups import DECODE, GROUPS, TEXT, VISION
from modes_cli.models.inputs import end_ids, prompt_batch
from modes_cli.models.loading import Loaded
from modes_cli.requests import ExportRequest
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.policy import Rule, tau_vector
from tests.export.bundles import make_run
from tests.once import once
from tests.runtime.test_deploy import run_program
from tests.runtime.test_session import picture

pytest.importorskip("onnxruntime_genai", reason="`pip install onnxruntime-genai-cuda` beside onnxruntime-gpu")

from tests.runtime.genai_run import Genai, ask_transformers, until_end

QUESTIONS = 100
LAYERS = 8
TAU = {"text": 0.017, "vision": 0.021}
# More important layers keep more, as calibration finds it.
SHARES = {layer: (share,) * 5 for layer, share in enumerate((0.2, 0.17, 0.14, 0.12, 0.11, 0.1, 0.09, 0.07))}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        export_bundle(ExportRequest(run=make_run(folder / "run", "digits", TAU, SHARES, experts=32, top_k=8)))

    return once(tmp_path_factory.getbasetemp(), "digits-genai", make) / "run" / "bundle"


@pytest.fixture(scope="module")
def genai(bundle: Path) -> Genai:
    return Genai(bundle)


@pytest.fixture(scope="module")
def questions() -> list[Sample]:
    """Held out: the split that nothing was trained or calibrated on."""
    return list(open_source(DataSpec("digits", "test", QUESTIONS, 0), text_only=False))


@pytest.fixture
def engine(digits: Loaded) -> Iterator[SkipEngine]:
    engine = SkipEngine(digits.model, digits.blocks, digits.tokens)
    yield engine
    engine.remove()


def rule(tau: dict[str, float]) -> Rule:
    scale = torch.ones(LAYERS, len(GROUPS))
    scale[:, [TEXT, VISION, DECODE]] = torch.tensor([share[0] for share in SHARES.values()])[:, None]
    return Rule(scale, tau_vector(tau))


@pytest.mark.parametrize(("graph", "tau"), [(None, TAU), ("decoder-0.1.onnx", {"text": 0.02, "vision": 0.03})])
def test_answers_of_transformers_with_the_same_thresholds(
    bundle: Path, digits: Loaded, engine: SkipEngine, questions: list[Sample], graph: str | None, tau: dict[str, float]
) -> None:
    engine.rule = rule(tau)
    expected = ask_transformers(digits, questions)
    assert 0.2 < engine.counts.skip_ratio() < 0.95
    asked = Genai(bundle, graph)
    assert [asked.answer(sample) for sample in questions] == expected
    assert len({tuple(row) for row in expected}) > QUESTIONS // 5  # or the comparison would mean little


def test_at_tau_0_the_answers_of_the_unmodified_model(
    bundle: Path, genai: Genai, digits: Loaded, questions: list[Sample]
) -> None:
    expected = ask_transformers(digits, questions)
    asked = Genai(bundle, "decoder-0.onnx")
    assert [asked.answer(sample) for sample in questions] == expected
    # And skipping is not nothing: some logits differ.
    prompt = genai.prompt(questions[0])
    full, skipped = asked.generate(prompt, 1, 1)[1], genai.generate(prompt, 1, 1)[1]
    assert np.abs(full - skipped).max() > 1e-2


@pytest.mark.parametrize(
    "images",
    [
        pytest.param((), id="none"),
        pytest.param(((50, 75),), id="resized"),
        pytest.param(((48, 48), (48, 48)), id="two of a size"),
        pytest.param(((48, 48), (96, 24), (24, 96)), id="three sizes"),
    ],
)
def test_logits_of_transformers(genai: Genai, digits: Loaded, engine: SkipEngine, images: tuple[tuple[int, int], ...]) -> None:
    """Whatever is shown: the image processor's steps, positions and DeepStack features are those of transformers."""
    sample = Sample("?", tuple(picture(*size, number) for number, size in enumerate(images)), "How many digits?", "x", "t")
    engine.rule = rule(TAU)
    inputs = prompt_batch(digits, [sample]).inputs
    tokens, found = genai.generate(genai.prompt(sample), 1)
    with torch.no_grad():
        out = digits.model.generate(
            **inputs, max_new_tokens=found.shape[1], do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    expected = torch.stack(out.logits, 1).numpy()
    assert tokens[0] == until_end(out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), end_ids(digits))
    np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=2e-3)
    assert expected.std() > 1


def test_a_batch_of_different_lengths(genai: Genai, questions: list[Sample]) -> None:
    """Each row as alone, after the prompt as well: the graph remembers the padding that onnxruntime-genai's mask forgets."""
    wordy = sorted(questions, key=lambda sample: len(sample.answer))[-10:]  # go on long enough to look back at padding
    short, *_, long = sorted(questions, key=lambda sample: len(sample.question))
    samples = [short, min(wordy, key=lambda sample: len(sample.question)), long, wordy[-1]]
    tokens, logits = genai.generate(genai.together(samples), len(samples))
    alone = [genai.generate(genai.prompt(sample), 1) for sample in samples]
    assert tokens == [found[0][0] for found in alone]
    for row, (_, expected) in zip(logits, alone, strict=True):
        steps = min(len(row), expected.shape[1])
        np.testing.assert_allclose(row[:steps], expected[0, :steps], atol=2e-3)
    assert alone[1][1].shape[1] > 2


def test_the_program_in_the_docs(bundle: Path, questions: list[Sample], tmp_path: Path) -> None:
    """In a process of its own, at two points of the frontier."""
    questions[1].images[0].save(tmp_path / "a.png")
    model = OrtModel(bundle, threads=1)
    for graph, tau in (((), None), (("decoder-0.onnx",), {})):
        expected = model.generate([questions[1].images], [questions[1].question], 16, tau)
        assert run_program("answer.py", bundle, tmp_path / "a.png", questions[1].question, *graph) == f"{expected.texts[0]}\n"


def test_the_folder_is_as_it_was(bundle: Path) -> None:
    """Checked after everything above has run from it."""
    checks = verify_bundle(bundle)
    assert [check for check in checks if not check.ok] == []
    assert "genai_config.json" in [check.name for check in checks]
