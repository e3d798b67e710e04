"""modes::Route in real ONNX Runtime sessions: what softmax, top-k and a formula's torch operations give, and mistakes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from modes_cli.export import graph, scores
from modes_cli.models import groups
from modes_cli.runtime import kernels
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import ONE, Formula
from modes_cli.skipping.policies.predicted import PredictedNorm
from modes_cli.skipping.policies.salient import SalientNorm
from modes_cli.skipping.policy import routing_probability, scale_of

HIDDEN = 43  # fills no vector
GROUPS = len(groups.GROUPS) + 1  # with padding's, which a formula has no row for
ROUTE = ("logits", "expert_ids", "expert_weights", "group", "score_scale", "x", "predictor_logits", "predictor_bias",
         "coefficients", "range", "saliency", "saliency_range")  # fmt: skip
ELEMENT = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32}
OUTPUTS = {"ids": TensorProto.INT64, "weights": TensorProto.FLOAT, "score": TensorProto.FLOAT}


class Routed:
    """A session of one node, all inputs fed."""

    def __init__(self, given: dict[str, Tensor], outputs: Sequence[str], threads: int = 1, **attributes: object) -> None:
        names = [name if name in given else "" for name in ROUTE]
        while not names[-1]:
            names.pop()
        node = helper.make_node(
            "Route", names, [name if name in outputs else "" for name in OUTPUTS], domain="modes", **attributes
        )
        values = [
            helper.make_tensor_value_info(name, ELEMENT[t.dtype], [f"{name}_{axis}" for axis in range(t.dim())])
            for name, t in given.items()
        ]
        results = [helper.make_tensor_value_info(name, OUTPUTS[name], None) for name in outputs]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("modes", 1)]
        proto = helper.make_model(helper.make_graph([node], "route", values, results), opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(kernels.library_path()))
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        self.session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __call__(self, given: dict[str, Tensor]) -> list[Tensor]:
        found = self.session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        return [torch.from_numpy(value) for value in found]


def route(given: dict[str, Tensor], outputs: Sequence[str], **attributes: object) -> list[Tensor]:
    return Routed(given, outputs, **attributes)(given)  # type: ignore[arg-type]


def logits_of(tokens: int, experts: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


# -- routing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "top_k"), [(6, 1), (32, 8), (45, 45), (700, 6)])
@pytest.mark.parametrize("normalise", [0, 1])
@pytest.mark.parametrize("softmax_first", [0, 1])
def test_routes_as_torch_does(experts: int, top_k: int, normalise: int, softmax_first: int) -> None:
    logits = logits_of(70, experts)
    options = {"top_k": top_k, "normalise": normalise, "softmax_first": softmax_first}
    ids, weights = route({"logits": logits}, ("ids", "weights"), **options)
    if softmax_first:
        expected, chosen = logits.softmax(-1).topk(top_k)
        expected = expected / expected.sum(-1, keepdim=True) if normalise else expected
    else:
        values, chosen = logits.topk(top_k)
        expected = values.softmax(-1)
    assert torch.equal(ids, chosen)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("softmax_first", [0, 1])
def test_of_equal_ones_the_lower_expert_comes_first(softmax_first: int) -> None:
    logits = torch.tensor([[0.5, 2.0, 2.0, 2.0, 0.5, 0.5, -torch.inf], [0.0] * 7, [-200.0, 0.0, -200.0, -200.0, 0, -300, -200]])
    ids, weights = route({"logits": logits}, ("ids", "weights"), top_k=5, softmax_first=softmax_first)
    assert ids[:2].tolist() == [[1, 2, 3, 0, 4], [0, 1, 2, 3, 4]]
    assert ids[2, :4].tolist() == [1, 4, 0, 2]  # the rest is 0 after a softmax, and told apart before it
    assert torch.equal(weights[1], weights[1, :1].expand(5))


def test_nan_stays_in_its_token_and_ids_are_experts() -> None:
    logits = logits_of(3, 9)
    logits[1, 4] = torch.nan
    for first in (0, 1):
        ids, weights = route({"logits": logits}, ("ids", "weights"), top_k=4, softmax_first=first)
        alone = route({"logits": logits[[0, 2]]}, ("ids", "weights"), top_k=4, softmax_first=first)
        assert torch.equal(ids[[0, 2]], alone[0])
        assert torch.equal(weights[[0, 2]], alone[1])
        assert sorted(set(ids[1].tolist())) == sorted(ids[1].tolist())
        assert first == 0 or bool(weights[1].isnan().all())


# -- scores ---------------------------------------------------------------------------------------------------------------


def formula_of(kind: type[Formula], experts: int) -> Formula:
    g = torch.Generator().manual_seed(experts)
    tensors = {
        "router": torch.randn(1, experts, HIDDEN, generator=g) / 6,
        "router_bias": torch.randn(1, experts, generator=g),
        "coefficients": torch.randn(1, experts, experts + 2, generator=g) / experts,
        "range": torch.tensor([[-0.7, 0.5]]),
    }
    if kind is SalientNorm:
        tensors["saliency"] = torch.randn(1, GROUPS - 1, HIDDEN + 1, generator=g) / 6
        tensors["saliency_range"] = torch.tensor([[[-1.0, 0.3], [-40.0, 0.1], [-0.5, 0.4], [-0.2, 0.2], [-0.1, 0.1]]])
    return kind(tensors, {"power": 0.7})


def hidden_of(formula: Formula, tokens: int) -> Tensor:
    """[T, H]; token 1 matters so little that its scores are the least there are."""
    hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    if tokens > 1 and "saliency" in formula.tensors:
        hidden[1] = -100 * formula.tensors["saliency"][0, 1, :-1]
    return hidden


def problem(kind: type[Formula], experts: int, tokens: int, *, per_expert: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """What the node is given, with a routing of its own, and the score as torch computes it."""
    formula, g = formula_of(kind, experts), torch.Generator().manual_seed(tokens)
    own = {name: tensor[0] for name, tensor in formula.tensors.items()}
    hidden = hidden_of(formula, tokens)
    logits = 3 * torch.randn(tokens, experts, generator=g)
    weights, ids = logits.softmax(-1).topk(min(4, experts))
    group = (torch.arange(tokens) % GROUPS).int()  # the last is padding's, beyond the formula's own
    scale = torch.rand(GROUPS, experts, generator=g) if per_expert else torch.rand(GROUPS, generator=g)
    given = {"expert_ids": ids, "expert_weights": weights, "group": group, "score_scale": scale}
    if kind is SalientNorm:
        given["x"] = hidden
    given |= {"predictor_logits": hidden @ own["router"].T, "predictor_bias": own["router_bias"]}
    given |= {name: own[name] for name in ("coefficients", "range", "saliency", "saliency_range") if name in own}
    pairs = Pairs(0, routing_probability(weights), group, ids, hidden)
    return given, scale_of(scale, pairs) * formula.of(own, pairs)


@pytest.mark.parametrize("kind", [PredictedNorm, SalientNorm])
@pytest.mark.parametrize("experts", [3, 32, 45])
@pytest.mark.parametrize("per_expert", [False, True])
def test_scores_as_the_formula_does(kind: type[Formula], experts: int, per_expert: bool) -> None:
    for tokens in (1, 90):
        given, expected = problem(kind, experts, tokens, per_expert=per_expert)
        (score,) = route(given, ("score",), top_k=expected.shape[1], power=0.7)
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=0.0)
        if kind is SalientNorm and tokens == 90 and not per_expert:
            assert torch.equal(score[1], given["score_scale"][1].expand(score.shape[1]) / ONE)


def test_routing_and_scores_at_once_are_the_two_in_turn() -> None:
    given, _ = problem(SalientNorm, 32, 50)
    logits = logits_of(50, 32)
    options = {"top_k": 4, "normalise": 1, "power": 0.7}
    ids, weights = route({"logits": logits}, ("ids", "weights"), **options)
    (score,) = route(given | {"expert_ids": ids, "expert_weights": weights}, ("score",), **options)
    rest = {name: tensor for name, tensor in given.items() if not name.startswith("expert_")}
    together = route({"logits": logits} | rest, ("ids", "weights", "score"), **options)
    assert all(torch.equal(one, other) for one, other in zip(together, (ids, weights, score), strict=True))


def test_same_bits_for_any_number_of_threads_and_tokens() -> None:
    given, _ = problem(SalientNorm, 45, 300)
    (expected,) = route(given, ("score",), top_k=4, power=0.7)
    assert torch.equal(Routed(given, ("score",), threads=4, top_k=4, power=0.7)(given)[0], expected)
    by_token = {"expert_ids", "expert_weights", "group", "x", "predictor_logits"}
    one = {name: tensor[7:8].clone() if name in by_token else tensor for name, tensor in given.items()}
    assert torch.equal(route(one, ("score",), top_k=4, power=0.7)[0], expected[7:8])


def test_no_tokens_and_a_nan() -> None:
    given, _ = problem(SalientNorm, 9, 6)
    by_token = {"expert_ids", "expert_weights", "group", "x", "predictor_logits"}
    none = {name: tensor[:0].clone() if name in by_token else tensor for name, tensor in given.items()}
    assert route(none, ("score",), top_k=4)[0].shape == (0, 4)
    (expected,) = route(given, ("score",), top_k=4, power=0.7)
    for name in ("x", "predictor_logits", "expert_weights"):
        broken = given | {name: given[name].clone()}
        broken[name][2, 1] = torch.nan
        (score,) = route(broken, ("score",), top_k=4, power=0.7)
        assert score[2].isnan().any(), name
        assert torch.equal(score[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("kind", [PredictedNorm, SalientNorm])
def test_a_traced_score_is_this_node(kind: type[Formula], tmp_path: object) -> None:
    """As the decoder's graph has it where a family routes in its own way."""
    formula = formula_of(kind, 32)

    class Traced(torch.nn.Module):
        def forward(self, weights: Tensor, experts: Tensor, hidden: Tensor, group: Tensor, scale: Tensor) -> Tensor:
            own = {name: tensor[0] for name, tensor in formula.tensors.items()}
            pairs = Pairs(0, routing_probability(weights), group, experts, hidden)
            found = scores.one_node(formula, own, Block(), scale, pairs, weights)  # type: ignore[arg-type]
            assert found is not None
            return found

    class Block:
        scales_input, top_k = False, 4

    given, expected = problem(kind, 32, 20)
    hidden = hidden_of(formula, 20)
    example = {"weights": given["expert_weights"], "experts": given["expert_ids"], "hidden": hidden, "group": given["group"],
               "scale": given["score_scale"]}  # fmt: skip
    shapes: dict[str, graph.Shape] = {"weights": ["T", 4], "experts": ["T", 4], "hidden": ["T", HIDDEN], "group": ["T"],
                                      "scale": [GROUPS]}  # fmt: skip
    dynamic = {name: {} if name == "scale" else {0: graph.AUTO} for name in shapes}
    model = graph.trace(Traced(), example, dynamic, shapes, {"score": ["T", 4]})
    assert [node.op_type for node in model.graph if node.domain == "modes"] == ["Route"]
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(kernels.library_path()))
    session = ort.InferenceSession(graph.ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    (score,) = session.run(None, {name: tensor.numpy() for name, tensor in example.items()})
    torch.testing.assert_close(torch.from_numpy(score), expected, rtol=1e-5, atol=0.0)


# -- mistakes -------------------------------------------------------------------------------------------------------------


def test_mistakes_raise_and_the_session_goes_on() -> None:
    given, _ = problem(SalientNorm, 9, 6)
    opened = Routed(given, ("score",), top_k=4, power=0.7)
    (expected,) = opened(given)
    ids, group = given["expert_ids"].clone(), given["group"].clone()
    ids[4, 2], group[3] = 9, -1
    bad = [
        ({"expert_ids": ids}, "expert id `9` of token 4, slot 2 is not in 0..8"),
        ({"group": group}, "group `-1` of token 3 is not in 0..5"),
        ({"group": group[:5]}, "group has shape `[5]`, expected [6]"),
        ({"coefficients": given["coefficients"][:, :-1].contiguous()}, "coefficients has shape `[9, 10]`, expected [9, 11]"),
        ({"saliency": given["saliency"][:, :-1].contiguous()}, "saliency has shape `[5, 43]`, expected [5, 44]"),
        ({"expert_weights": given["expert_weights"][:, :3].contiguous()}, "expert_weights has shape `[6, 3]`, expected [6, 4]"),
    ]
    for changes, message in bad:
        with pytest.raises(Exception, match=r"modes\.Route") as caught:
            opened(given | changes)
        assert message in str(caught.value)
        assert torch.equal(opened(given)[0], expected)


def test_inputs_that_do_not_go_together() -> None:
    given, _ = problem(PredictedNorm, 9, 6)
    with pytest.raises(Exception, match=r"logits, expert_ids and expert_weights exclude each other"):
        route(given | {"logits": logits_of(6, 9)}, ("score",), top_k=4)
    with pytest.raises(Exception, match=r"range is missing"):
        route({name: tensor for name, tensor in given.items() if name != "range"}, ("score",), top_k=4)
    with pytest.raises(Exception, match=r"neither logits nor score_scale"):
        route({name: given[name] for name in ("expert_ids", "expert_weights")}, ("ids",), top_k=4)
    with pytest.raises(Exception, match=r"top_k `10`"):
        route({"logits": logits_of(6, 9)}, ("ids", "weights"), top_k=10)
    with pytest.raises(Exception, match=r"attribute top_k is `0`, expected 1 or more"):
        route({"logits": logits_of(6, 9)}, ("ids", "weights"))
    assert np.isfinite(route(given, ("score",), top_k=4)[0].numpy()).all()
