"""The embedding graph: token embeddings with image features in the places of image tokens."""

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modes_cli.export import graph
from modes_cli.export.families.base import Family
from modes_cli.export.graph import AUTO
from modes_cli.export.skeleton import keep_only


class Embedding(nn.Module):
    """Deepstack features lie beside the embeddings in the last axis and are zero at text rows."""

    def __init__(self, model: nn.Module, family: Family, vision_ids: tuple[int, ...]) -> None:
        super().__init__()
        for name, child in keep_only(model, [family.embedding]).named_children():
            self.add_module(name, child)
        self.path, self.placeholder = family.embedding, family.placeholder
        self.register_buffer("vision_ids", torch.tensor(vision_ids, dtype=torch.int64), persistent=False)

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        vision = (input_ids[..., None] == self.get_buffer("vision_ids")).any(-1)
        # A placeholder's id may lie beyond the table.
        known = input_ids if self.placeholder is None else torch.where(vision, self.placeholder, input_ids)
        embeds = self.get_submodule(self.path)(known)
        hidden = embeds.shape[-1]
        order = vision.reshape(-1).to(torch.int64).cumsum(0).reshape(vision.shape)
        # A model may generate an image token; there is no feature for it then, and it keeps its plain embedding.
        filled = vision & (order <= image_features.shape[0])
        table = torch.cat([torch.zeros_like(image_features[:1].sum(0, keepdim=True)), image_features])  # row 0: not filled
        rows = table[torch.where(filled, order, 0)]
        first = torch.where(filled[..., None], rows[..., :hidden], embeds)
        return torch.cat([first, rows[..., hidden:]], -1)


def export_embedding(
    model: nn.Module, mode: FakeTensorMode, family: Family, vision_ids: tuple[int, ...], deepstack: int
) -> ir.Model:
    """input_ids [B, S] int64, image_features [M, (1 + n) * H] float32, M may be 0 -> inputs_embeds [B, S, (1 + n) * H]."""
    module = Embedding(model, family, vision_ids).eval()
    width = (1 + deepstack) * module.get_parameter(f"{family.embedding}.weight").shape[1]
    with mode:
        example = {"input_ids": torch.zeros(2, 5, dtype=torch.int64), "image_features": torch.zeros(4, width)}
    return graph.trace(
        module,
        example,
        {"input_ids": {0: AUTO, 1: AUTO}, "image_features": {0: AUTO}},
        {"input_ids": ["batch", "length"], "image_features": ["image_tokens", width]},
        {"inputs_embeds": ["batch", "length", width]},
    )
