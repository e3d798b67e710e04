"""The models that tools/train_reference.py trains: how each is built, fed, balanced and saved."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import reference.model as qwen
import second_model as kimi
import torch
from reference.packing import MERGE, PATCH, QWEN, TEMPORAL, TOKENS_PER_SIDE, Batch, Packer, image_inputs
from reference.tokenizer import Conventions, build_tokenizer
from second_balance import expert_load, unevenness, update_bias
from second_evidence import EvidenceAttention, evidence_targets
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from modes_cli.data.digits_vqa import GRID, SIDE
from modes_cli.models.processor import ImageTextQwen3VLProcessor

EVIDENCE_LAYER = 3  # of Kimi's decoder


class Trained(ABC):
    """A model in training with its tokenizer and packer."""

    name: str
    hidden: int
    top_k: int
    balance = 0.0  # weight of the balance loss
    bias_rate = 0.0  # what a step moves the bias of the choice by
    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    packer: Packer

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """Of the decoder."""

    @abstractmethod
    def answers(self, batch: Batch, answer: Tensor) -> Tensor:
        """Logits [answer tokens, V] where `answer` [B, S - 1] is true."""

    @abstractmethod
    def router_losses(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Of the last `answers`, over tokens that are `real` [B * S]; scalars.

        Balance: 1 when every expert is used equally. Flatness: 0 when a token's top-k weights are equal, k - 1 at worst.
        """

    def evidence_loss(self, answer: Tensor, cells: Sequence[Sequence[int]]) -> Tensor:
        """How far, in the last `answers`, attention was from the cells that the questions are about; scalar.

        Raises:
            NotImplementedError: the family has none.
        """
        raise NotImplementedError(f"`{self.name}` has no evidence loss")

    def after_step(self, real: Tensor, rate: float) -> float | None:
        """What the family does besides gradients; how uneven the experts' load was, where that is measured."""
        return None

    def state_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `load_state_dict` takes, from the tensors of a saved file."""
        return tensors

    @abstractmethod
    def save(self, out: Path) -> None:
        """The checkpoint and its processor."""


def flatness(weights: Tensor) -> Tensor:
    """`weights` [T, k] -> scalar, 0 when they are equal, k - 1 when one has everything; differentiable."""
    share = weights / weights.sum(-1, keepdim=True)
    return (weights.shape[-1] * share.square().sum(-1) - 1).mean()


class Qwen(Trained):
    """Qwen3-VL-MoE: softmax routing, a balance loss."""

    name, hidden, top_k, balance = "qwen3_vl_moe", qwen.HIDDEN, qwen.TOP_K, 0.01

    def __init__(self, corpus: list[str]) -> None:
        self.tokenizer = build_tokenizer(corpus, Conventions())
        self.packer = Packer(self.tokenizer, QWEN, image_inputs)
        self.model = qwen.build_model(self.tokenizer)
        self._logits: tuple[Tensor, ...] = ()

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.language_model.layers

    def answers(self, batch: Batch, answer: Tensor) -> Tensor:
        out = self.model.model(**batch.inputs, output_router_logits=True, use_cache=False)
        self._logits = out.router_logits
        return self.model.lm_head(out.last_hidden_state[:, :-1][answer])

    def router_losses(self, real: Tensor) -> tuple[Tensor, Tensor]:
        balance, flat = [], []
        for logits in self._logits:
            probability = logits.float().softmax(-1)[real]
            top, index = probability.topk(qwen.TOP_K, -1)
            used = torch.zeros(qwen.EXPERTS).index_add_(0, index.reshape(-1), torch.ones(index.numel())) / len(probability)
            balance.append((used * probability.mean(0)).sum() * qwen.EXPERTS / qwen.TOP_K)
            flat.append(flatness(top))
        return torch.stack(balance).mean(), torch.stack(flat).mean()

    def save(self, out: Path) -> None:
        self.model.save_pretrained(out)
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=PATCH,
            merge_size=MERGE,
            temporal_patch_size=TEMPORAL,
            size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        ImageTextQwen3VLProcessor(image_processor, self.tokenizer, self.tokenizer.chat_template).save_pretrained(out)


class Kimi(Trained):
    """Kimi-VL: DeepSeek-V3's routing, balanced without a loss."""

    name, hidden, top_k, bias_rate = "kimi_vl", kimi.HIDDEN, kimi.TOP_K, 0.002

    def __init__(self, corpus: list[str]) -> None:
        family = Conventions(kimi.SPECIAL, kimi.LAYOUT.end, "[PAD]", kimi.CHAT_TEMPLATE)
        self.tokenizer = build_tokenizer(corpus, family)
        self.packer = Packer(self.tokenizer, kimi.LAYOUT, kimi.image_inputs)
        self.model = kimi.build_model(self.tokenizer)
        self.gates = [module for module in self.model.modules() if isinstance(module, DeepseekV3TopkRouter)]
        self.evidence = EvidenceAttention(self.layers[EVIDENCE_LAYER].self_attn)
        self._routed: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for number, gate in enumerate(self.gates):
            gate.register_forward_hook(lambda _m, _i, out, n=number: self._routed.__setitem__(n, out))

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.language_model.model.layers

    def answers(self, batch: Batch, answer: Tensor) -> Tensor:
        return self.model(**batch.inputs, use_cache=False).logits[:, :-1][answer]

    def router_losses(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """The balance is that of the sigmoid scores, normalised per token; its weight is 0 by default."""
        balance, flat = [], []
        for logits, weights, index in self._routed.values():
            scores = logits.sigmoid()[real]
            used = expert_load(index, real, kimi.EXPERTS) / len(scores)
            share = (scores / scores.sum(-1, keepdim=True)).mean(0)
            balance.append((used * share).sum() * kimi.EXPERTS / kimi.TOP_K)
            flat.append(flatness(weights[real]))
        return torch.stack(balance).mean(), torch.stack(flat).mean()

    def evidence_loss(self, answer: Tensor, cells: Sequence[Sequence[int]]) -> Tensor:
        targets = evidence_targets(cells, GRID, TOKENS_PER_SIDE)
        return self.evidence.loss(answer, self.packer.first_vision, targets)

    def after_step(self, real: Tensor, rate: float) -> float:
        uneven = []
        for gate, (_, _, index) in zip(self.gates, self._routed.values(), strict=True):
            load = expert_load(index, real, kimi.EXPERTS)
            update_bias(gate.e_score_correction_bias, load, rate)
            uneven.append(unevenness(load))
        return sum(uneven) / len(uneven)

    def state_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return kimi.state_of(tensors)

    def save(self, out: Path) -> None:
        kimi.save(out, self.model, self.tokenizer)


MODELS: dict[str, type[Qwen] | type[Kimi]] = {"qwen3_vl_moe": Qwen, "kimi_vl": Kimi}
