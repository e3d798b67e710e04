"""`modes bench --shape`: a random decoder, through the real command and piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modes_cli.artifacts import Bench
from modes_cli.benchmark import decoder as decoder_module
from modes_cli.benchmark.random_decoder import DTYPE, FilledCache, RandomDecoder, mrope_positions
from modes_cli.benchmark.shapes import decoder_shape
from modes_cli.errors import BadOption
from modes_cli.models.blocks import find_moe_blocks
from modes_cli.models.groups import TokenGroups
from modes_cli.run_folder import read_json
from modes_cli.skipping.engine import SkipEngine
from tests.cli.process import Commands

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_decoder() -> RandomDecoder:
    return RandomDecoder(decoder_shape("tiny"), None, CPU, seed=0)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Any:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


def test_the_command_times_every_case_and_writes_bench_json(command: Commands, tmp_path: Path) -> None:
    options = ("--shape", "tiny", "--layers", 2, "--batch", 1, "--batch", 3, "--repeats", 2, "--run", tmp_path, "--json")
    ended = command("bench", *options).ok()
    artifact = read_json(tmp_path / "bench.json", Bench)
    assert [case.model_dump(exclude_none=True) for case in artifact.cases] == ended.json["cases"]
    assert (artifact.model.id, artifact.model.dtype, artifact.data.source) == ("random:tiny", "bfloat16", "random")
    assert (artifact.options["shape"], artifact.options["layers"], artifact.options["context"]) == ("tiny", 2, 48)
    phases = [("prefill", 2), ("decode", 1), ("decode", 3)]
    for phase, batch in phases:
        same = [case for case in artifact.cases if (case.phase, case.batch) == (phase, batch)]
        assert [case.runtime for case in same] == ["transformers", *["transformers+modes"] * 4]
        assert same[0].speedup == 1.0
        assert all(case.seconds > 0 and case.limit_fraction > 0 for case in same)
        ratios = [case.skip_ratio for case in same]
        assert ratios[:2] == [0, 0]
        assert ratios == sorted(ratios)
        nearest = 1 / (batch * 4 * 2)  # a step of one sequence has 8 pairs
        assert ratios[2:] == pytest.approx([0.5, 0.75, 0.88], abs=0.02 if phase == "prefill" else nearest)
    assert {case.tokens for case in artifact.cases if case.phase == "prefill"} == {2 * 64}
    assert all("no threshold skips nearer" in note for note in artifact.notes)


def test_people_get_a_table(command: Commands, tmp_path: Path) -> None:
    ended = command("bench", "--shape", "tiny", "--layers", 1, "--batch", 1, "--repeats", 1, "--run", tmp_path).ok()
    assert "transformers+modes" in ended.out
    assert "of the limit" in ended.out
    assert "note: decode, batch 1: 88% asked for" in ended.out


def test_unknown_shapes_and_options_that_mean_nothing_are_refused(command: Commands, tmp_path: Path) -> None:
    for options, words in (
        (("--shape", "huge"), ("--shape huge", "")),
        (("--layers", 2), ("--layers 2", "")),
        (("--shape", "tiny", "--target", 0.5), ("--target 0.5", "")),
        (("--shape", "tiny", "--data", "digits"), ("--data digits", "")),
    ):
        command("bench", *options, "--run", tmp_path, "--json").refused("bad_option", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modes_cli.benchmark.random_decoder._free_memory", lambda _device: 10 << 30)
    with pytest.raises(BadOption, match=r"`48` layers needs `70` GB, `11` GB are free") as refused:
        RandomDecoder(decoder_shape("qwen3-vl-30b-a3b"), None, CPU, seed=0)
    assert "--layers" in str(refused.value.hint)


def test_the_real_shape_is_the_models() -> None:
    """30.5 billion parameters, of which 3.3 billion compute a token."""
    config = decoder_shape("qwen3-vl-30b-a3b").config(None)
    H, I, E, k = (config[name] for name in ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"))  # noqa: E741
    heads, kv, head = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    dense = 2 * heads * head * H + 2 * kv * head * H + E * H
    total = 2 * config["vocab_size"] * H + config["num_hidden_layers"] * (dense + E * 3 * H * I)
    active = 2 * config["vocab_size"] * H + config["num_hidden_layers"] * (dense + k * 3 * H * I)
    assert total / 1e9 == pytest.approx(30.5, abs=0.1)
    assert active / 1e9 == pytest.approx(3.3, abs=0.1)


def test_weights_follow_the_seed_and_leave_torchs_own_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (RandomDecoder(decoder_shape("tiny"), 1, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(p.dtype == DTYPE for p in (*first.model.parameters(), *first.head.parameters()))
    name = "layers.0.mlp.experts.down_proj"
    assert torch.equal(first.model.get_parameter(name), again.model.get_parameter(name))
    assert not torch.equal(first.model.get_parameter(name), other.model.get_parameter(name))


def test_positions_are_counted_as_transformers_counts_them() -> None:
    """Text, an image of 4 x 4, text: against the model's own get_rope_index."""
    config = transformers_config()
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel

    with torch.device("meta"):
        model = Qwen3VLMoeModel(config)
    positions = mrope_positions(2, 22, CPU)
    kinds = torch.tensor([[0] * 2 + [1] * 16 + [0] * 4] * 2, dtype=torch.int32)
    merge = config.vision_config.spatial_merge_size
    grid = torch.tensor([[1, 4 * merge, 4 * merge]] * 2)
    expected, _ = model.get_rope_index(torch.zeros(2, 22, dtype=torch.long), kinds, image_grid_thw=grid)
    assert torch.equal(positions, expected)


def transformers_config() -> Any:
    from transformers import Qwen3VLMoeConfig

    text = decoder_shape("tiny").config(1)
    return Qwen3VLMoeConfig(
        text_config=text, vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}
    )


def test_attention_for_graphs_computes_what_transformers_does(tiny_decoder: RandomDecoder) -> None:
    ids, positions = tiny_decoder.ids(2, 20), mrope_positions(2, 20, CPU)
    with torch.inference_mode():
        expected = tiny_decoder.prefill(ids, positions)
        with tiny_decoder.whole_attention():
            found = tiny_decoder.prefill(ids, positions)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_a_decode_step_computes_the_same_on_both_caches(tiny_decoder: RandomDecoder) -> None:
    cache = FilledCache(tiny_decoder.config, 3, 48, CPU)
    ids, positions = tiny_decoder.ids(3, 1), mrope_positions(3, 48, CPU)[:, :, -1:]
    with torch.inference_mode():
        expected = tiny_decoder.decode(ids, positions, cache.growing())
        with tiny_decoder.whole_attention():
            found = [tiny_decoder.decode(ids, positions, cache) for _ in range(2)]
    torch.testing.assert_close(found[0], expected, atol=2e-2, rtol=2e-2)
    assert torch.equal(found[0], found[1])  # a step can be repeated: it always writes the same place
    assert cache.get_seq_length() == 47
    assert cache.bytes == 3 * 2 * (3 * 2 * 48 * 16) * 2


def test_what_fails_is_noted_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from modes_cli.data.sample import DataSpec
    from modes_cli.requests import BenchRequest

    original = decoder_module._skipped

    def breaks(engine: SkipEngine, rule: Any, forward: Any) -> float:
        if float(rule.tau[0]) < 1e-20:  # nothing skipped
            raise RuntimeError("a kernel broke")
        return original(engine, rule, forward)

    monkeypatch.setattr(decoder_module, "_skipped", breaks)
    request = BenchRequest(
        DataSpec("random", None, None), tmp_path, batches=(8,), repeats=1, shape="tiny", layers=1, device="cpu"
    )
    artifact = decoder_module.bench_decoder(request, "tiny").artifact
    assert "left out: prefill, batch 2, 0% skipped: a kernel broke" in artifact.notes
    assert sum(case.runtime == "transformers+modes" for case in artifact.cases) == 6
    assert json.loads((tmp_path / "bench.json").read_text())["notes"] == artifact.notes


def test_the_engine_is_taken_out_again(tiny_decoder: RandomDecoder) -> None:
    blocks = find_moe_blocks(tiny_decoder.model)
    SkipEngine(tiny_decoder.model, blocks, TokenGroups((), ())).remove()
    assert tiny_decoder.config._experts_implementation == "grouped_mm"
