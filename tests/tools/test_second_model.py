"""What training sees is what the saved folder computes: packed rows, hub layout, the model before and after saving."""

import importlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from modes_cli.data.sample import Sample
from modes_cli.models.inputs import measuring_batch
from modes_cli.models.loading import load
from modes_cli.requests import ModelSpec
from tools import second_task

TOOLS = Path(second_task.__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[SimpleNamespace]:
    """A fresh second model with uneven biases, and the folder it was saved to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        from modes_cli.models.families import moonvit

        patch.setattr(moonvit.MoonViTBlock, "attention", moonvit.MoonViTBlock.attention)  # put back afterwards
        torch.manual_seed(0)
        task = importlib.import_module("train_tasks").TASKS["tiles"]
        trained = importlib.import_module("train_models").MODELS["kimi_vl"](task.corpus())
        for gate in trained.gates:
            gate.e_score_correction_bias.normal_(0, 0.1)
        folder = tmp_path_factory.mktemp("second")
        trained.save(folder)
        yield SimpleNamespace(task=task, trained=trained, folder=folder)


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    return list(islice(second_task.samples("validation", 1), len(second_task.KINDS)))


@torch.no_grad()
def test_the_saved_folder_computes_what_was_trained(made: SimpleNamespace, rows: list[Any]) -> None:
    loaded = load(ModelSpec(str(made.folder), device="cpu"))
    assert [(block.num_experts, block.top_k) for block in loaded.blocks] == [(32, 6)] * 6
    made.trained.model.eval()
    for scene, question in rows:
        packed = made.trained.packer.pack([(scene, [question])])
        sample = Sample("", (Image.fromarray(scene.canvas),), question.text, question.answer, question.kind)
        batch = measuring_batch(loaded, [sample])
        assert batch.inputs["input_ids"].tolist() == packed.inputs["input_ids"].tolist()
        assert torch.equal(batch.inputs["pixel_values"], packed.inputs["pixel_values"])
        assert torch.equal(batch.answer[:, :-1], packed.labels[:, 1:] != -100)
        wanted = made.trained.model(**packed.inputs).logits
        torch.testing.assert_close(loaded.model(**batch.inputs).logits, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_packed_questions_do_not_see_each_other(made: SimpleNamespace, rows: list[Any]) -> None:
    model, packer = made.trained.model.eval(), made.trained.packer
    scene, questions = rows[0][0], [question for _, question in rows[:3]]
    packed = packer.pack([(scene, questions)])
    logits = model(**packed.inputs).logits[:, :-1][packed.labels[:, 1:] != -100]
    alone = [packer.pack([(scene, [question])]) for question in questions]
    wanted = [model(**one.inputs).logits[:, :-1][one.labels[:, 1:] != -100] for one in alone]
    torch.testing.assert_close(logits, torch.cat(wanted), atol=1e-4, rtol=1e-4)


def test_weights_come_back_from_the_hub_layout(made: SimpleNamespace) -> None:
    kimi = importlib.import_module("second_model")
    state = made.trained.model.state_dict()
    back = kimi.state_of(kimi.hub_tensors(made.trained.model))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_a_step_moves_the_biases_towards_balance(made: SimpleNamespace) -> None:
    balance = importlib.import_module("second_balance")
    trained, task = made.trained, made.task
    scene, question = next(second_task.samples("train", 0))
    batch = trained.packer.pack([(scene, [question])])
    answer, real = batch.labels[:, 1:] != -100, batch.real.reshape(-1)
    assert task.cell_labels([scene]).shape == (4, 1, 36)
    uneven = []
    for _ in range(60):
        with torch.no_grad():
            trained.answers(batch, answer)
        uneven.append(trained.after_step(real, 0.01))
    assert uneven[-1] < 0.6 * uneven[0]
    assert balance.unevenness(torch.ones(4)) == 0


@torch.no_grad()
def test_the_evidence_loss_is_that_of_the_attention_that_is_computed(made: SimpleNamespace, rows: list[Any]) -> None:
    """Against the weights that transformers returns, for the first token of an answer and two heads of one layer."""
    trained, models = made.trained, importlib.import_module("train_models")
    evidence = importlib.import_module("second_evidence")
    scene, question = next((scene, question) for scene, question in rows if question.kind == "row")
    batch = trained.packer.pack([(scene, [question])])
    inputs = {name: value for name, value in batch.inputs.items() if name != "attention_mask"}  # one question: just causal
    answer = batch.labels[:, 1:] != -100
    trained.model.eval().set_attn_implementation("eager")
    try:
        weights = trained.model(**inputs, output_attentions=True).attentions[models.EVIDENCE_LAYER]
    finally:
        trained.model.set_attn_implementation("sdpa")
    loss = trained.evidence_loss(answer, [question.cells])
    start, first = trained.packer.first_vision, int(answer[0].nonzero()[0])
    looked = weights[0, : evidence.HEADS, first, start : start + 36]
    looked = looked / looked.sum(-1, keepdim=True)
    # Each of the row's three cells is 2x2 of the 6x6 vision tokens.
    told = [token for token in range(36) if token // 12 * 3 + token % 6 // 2 in question.cells]
    assert len(told) == 12
    assert loss.item() == pytest.approx((-looked[:, told].log().mean() - torch.tensor(12.0).log()).item(), abs=1e-4)


def test_first_of_answers() -> None:
    evidence = importlib.import_module("second_evidence")
    answer = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]]).bool()
    assert [part.tolist() for part in evidence.first_of_answers(answer)] == [[0, 0, 1, 1], [1, 4, 0, 3]]


@torch.no_grad()
def test_a_limit_keeps_the_experts_of_largest_weight(made: SimpleNamespace) -> None:
    """DeepSeek-V3's gate does not sort what it chooses. Against transformers' own loop over experts."""
    reference = importlib.import_module("reference.model")
    experts = reference.experts_of(made.trained.model.eval())[0]
    generator = torch.Generator().manual_seed(1)
    tokens, weights = torch.randn(7, 128, generator=generator), torch.rand(7, 6, generator=generator)
    chosen = torch.stack([torch.randperm(32, generator=generator)[:6] for _ in range(7)])
    try:
        for limit in (6, 2, 0):
            experts.limit = limit
            larger = (weights[:, None, :] > weights[:, :, None]).sum(-1)  # how many of the token's weights are
            kept = weights * (larger < limit)
            wanted = type(experts).forward.__wrapped__(experts, tokens, chosen, kept)
            torch.testing.assert_close(reference._experts(experts, tokens, chosen, weights), wanted, atol=1e-5, rtol=1e-5)
    finally:
        del experts.limit
