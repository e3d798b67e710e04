"""Finding experts: every known layout described as it is, everything else refused by name and shape."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from modes_cli.errors import BadModel, UnknownLayout
from modes_cli.models.blocks import MoEBlock, find_moe_blocks
from modes_cli.models.loading import Loaded
from tests import families
from tests.checkpoints import DENSE_LAYERS, EXPERTS, HIDDEN, LAYERS, TOP_K
from tests.families import FAMILIES

# Decoder layers with experts; transposed, interleaved, biases, activation.
STANDARD = (False, False, False, "silu")
KNOWN: dict[str, tuple[list[int], tuple[bool, bool, bool, str]]] = {
    "qwen3_vl_moe": ([1, 2, 3], STANDARD),
    "internvl_qwen3_moe": ([0, 1, 2], STANDARD),
    "internvl_gpt_oss": ([0, 1, 2], (True, True, True, "swiglu_oai")),
    "kimi_k25": ([1, 2, 3], STANDARD),
    "glm4v_moe": ([1, 2], STANDARD),
    "step3p7": ([1, 2], STANDARD),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_sizes_and_layout_of_each_family(family: str) -> None:
    model, _ = FAMILIES[family]()
    layers, layout = KNOWN[family]

    blocks = find_moe_blocks(model)

    assert [block.layer for block in blocks] == layers
    assert [block.index for block in blocks] == list(range(len(layers)))
    for block in blocks:
        assert (block.transposed, block.interleaved, block.has_bias, block.activation) == layout
        assert (block.num_experts, block.top_k) == (families.EXPERTS, families.TOP_K)
        assert (block.hidden_size, block.intermediate_size) == (families.HIDDEN, families.INTERMEDIATE)
        assert model.get_submodule(block.name) is block.experts


def test_index_counts_moe_layers_and_layer_counts_all(tiny: Loaded) -> None:
    assert [(block.index, block.layer) for block in tiny.blocks] == [
        (i, i + DENSE_LAYERS) for i in range(LAYERS - DENSE_LAYERS)
    ]
    assert {(block.num_experts, block.top_k, block.hidden_size) for block in tiny.blocks} == {(EXPERTS, TOP_K, HIDDEN)}


def test_the_built_in_model_agrees_with_its_configuration(digits: Loaded) -> None:
    text = digits.model.config.text_config
    dense = set(text.mlp_only_layers or [])
    assert [block.layer for block in digits.blocks] == [i for i in range(text.num_hidden_layers) if i not in dense]
    assert {block.num_experts for block in digits.blocks} == {text.num_experts}
    assert {block.top_k for block in digits.blocks} == {text.num_experts_per_tok}
    assert {block.intermediate_size for block in digits.blocks} == {text.moe_intermediate_size}


class SomeExperts(nn.Module):
    """Experts as transformers writes them; shapes and activation can be made wrong."""

    def __init__(self, gate_up: tuple[int, ...] = (4, 12, 8), down: tuple[int, ...] = (4, 8, 6), act: str = "silu") -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(gate_up)), nn.Parameter(torch.zeros(down))
        self.act_fn = ACT2FN[act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states


class OneTensorExperts(SomeExperts):
    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return hidden_states


class SomeModel(nn.Module):
    """A vision tower with experts of its own beside a decoder whose second layer is given."""

    def __init__(self, second: nn.Module, **config: Any) -> None:
        super().__init__()
        self.visual = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": SomeExperts()}) for _ in range(2)])})
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(8, 8)}), second])})
        self.config = SimpleNamespace(model_type="some", **(config or {"num_experts_per_tok": 2}))

    def get_decoder(self) -> nn.Module:
        return self.decoder


def find(experts: nn.Module, **config: Any) -> list[MoEBlock]:
    return find_moe_blocks(SomeModel(nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})}), **config))


def test_experts_of_a_vision_tower_are_left_alone() -> None:
    (block,) = find(SomeExperts())
    assert (block.layer, block.index, block.name) == (1, 0, "decoder.layers.1.mlp.experts")


def test_a_decoder_without_experts_is_refused_even_if_the_vision_tower_has_some() -> None:
    with pytest.raises(BadModel, match=r"`SomeModel` \(model type `some`\) has no MoE layers"):
        find_moe_blocks(SomeModel(nn.ModuleDict({"mlp": nn.Linear(8, 8)})))


@pytest.mark.parametrize(("act", "name"), [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh")])
def test_known_activations(act: str, name: str) -> None:
    assert [block.activation for block in find(SomeExperts(act=act))] == [name]


@pytest.mark.parametrize("field", ["num_experts_per_tok", "top_k_experts", "moe_k", "num_experts_per_token"])
def test_top_k_is_read_from_any_of_its_names(field: str) -> None:
    assert [block.top_k for block in find(SomeExperts(), **{field: 3})] == [3]


def test_transposed_weights_are_read_the_other_way_round() -> None:
    experts = SomeExperts(gate_up=(4, 8, 12), down=(4, 6, 8))
    experts.is_transposed = True  # type: ignore[assignment]
    (block,) = find(experts)
    assert (block.transposed, block.hidden_size, block.intermediate_size) == (True, 8, 6)


@pytest.mark.parametrize(
    ("experts", "names"),
    [
        (
            nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 8)]),
            ["`ModuleList`", "(6, 8)"],
        ),  # one module per expert, as Kimi-VL has
        (SomeExperts(gate_up=(4, 8, 12), down=(4, 6, 8)), ["`SomeExperts`", "(4, 8, 12)", "(4, 6, 8)"]),  # transposed, not said
        (SomeExperts(gate_up=(4, 13, 8)), ["`SomeExperts`", "(4, 13, 8)"]),  # no halves
        (SomeExperts(down=(5, 8, 6)), ["(4, 12, 8)", "(5, 8, 6)"]),  # another number of experts
        (SomeExperts(gate_up=(48, 8), down=(4, 8, 6)), ["`SomeExperts`", "(48, 8)"]),
        (SomeExperts(gate_up=(4, 12, 8), down=(32, 6)), ["`SomeExperts`", "(32, 6)"]),
        (OneTensorExperts(), ["`OneTensorExperts`", "hidden_states"]),
        (SomeExperts(act="relu"), ["`SomeExperts`", "`ReLU`"]),
    ],
    ids=["list", "transposed", "odd", "count", "flat-gate", "flat-down", "arguments", "activation"],
)
def test_what_is_not_understood_is_named(experts: nn.Module, names: list[str]) -> None:
    with pytest.raises(UnknownLayout) as caught:
        find(experts)
    for name in [*names, "decoder.layers.1.mlp.experts"]:
        assert name in str(caught.value)


def test_the_message_about_many_experts_stays_readable() -> None:
    with pytest.raises(UnknownLayout) as caught:
        find(nn.ModuleList([nn.Linear(8, 6) for _ in range(256)]))
    assert len(str(caught.value)) < 500


def test_a_configuration_without_top_k_is_refused() -> None:
    with pytest.raises(UnknownLayout, match="does not say how many experts"):
        find(SomeExperts(), num_experts=4)


def test_two_sets_of_experts_in_a_layer_are_refused() -> None:
    both = nn.ModuleDict(
        {"text_moe": nn.ModuleDict({"experts": SomeExperts()}), "vision_moe": nn.ModuleDict({"experts": SomeExperts()})}
    )
    with pytest.raises(UnknownLayout, match="more than one set of experts"):
        find_moe_blocks(SomeModel(both))


def test_llama4s_experts_are_transposed_and_called_by_its_layout() -> None:
    model, _ = families.llama4()
    (block,) = find_moe_blocks(model)
    assert (block.layer, block.moe, block.transposed) == (1, "language_model.model.layers.1.feed_forward", True)
    assert (block.num_experts, block.top_k, block.hidden_size, block.intermediate_size) == (8, 2, families.HIDDEN, 32)
    assert block.scales_input


def test_llama4s_experts_in_another_module_are_refused() -> None:
    model, _ = families.llama4()
    moe = model.language_model.model.layers[1].feed_forward
    model.language_model.model.layers[1].feed_forward = nn.ModuleDict({"experts": moe.experts})
    with pytest.raises(UnknownLayout, match=r"`Llama4TextExperts`.*hidden_states"):
        find_moe_blocks(model)
