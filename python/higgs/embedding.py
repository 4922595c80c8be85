"""``HiggsEmbedding``: a quantized ``torch.nn.Embedding``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from . import _ops
from .linear import HiggsLinear


class HiggsEmbedding(HiggsLinear):
    """Rows of W^ [out_features, in_features] = [num_embeddings, embedding_dim], each decoded when it is looked up.

    In the stored layout on every device: no kernel multiplies by it.
    """

    padding_idx: int | None = None
    rows_like: Tensor  # [0], in the dtype of the rows

    def forward(self, ids: Tensor) -> Tensor:
        """``ids``: integers of any shape; returns [*shape, embedding_dim] in the dtype of the model."""
        rows, (indices, scales) = ids.flatten(), self.stored()
        packed = indices[rows], scales[rows], self.column_scale
        return _ops.dequantize(*packed, *self._arguments, self.rows_like.dtype).view(*ids.shape, self.in_features)

    def stand_for(self, original: nn.Module) -> HiggsEmbedding:
        embedding = cast(nn.Embedding, original)
        self.register_buffer("rows_like", embedding.weight.detach().new_empty(0), persistent=False)
        self.padding_idx = embedding.padding_idx
        super().stand_for(original)
        return self

    def tile_(self) -> HiggsEmbedding:
        return self

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """An ordinary Embedding with the dequantized rows."""
        embedding = nn.Embedding(0, self.in_features, device="meta")
        embedding.num_embeddings, embedding.padding_idx = self.out_features, self.padding_idx
        embedding.weight = nn.Parameter(self.dequantize(dtype))
        return embedding.train(self.training)


def quantized_class(original: nn.Module) -> type[HiggsLinear]:
    """What takes the place of ``original``."""
    return HiggsEmbedding if isinstance(original, nn.Embedding) else HiggsLinear


def tied_message(embedding: str, head: str | None) -> str:
    return (
        f"the embedding {embedding} cannot be quantized alone, the output head {head} shares its weight; give "
        "lm_head_grid, too: each then has tensors of its own"
    )


def input_embedding(model: nn.Module) -> str | None:
    """The name of the input embedding, if there is one that can be quantized: of the class ``nn.Embedding`` itself."""
    get_embedding: Any = getattr(model, "get_input_embeddings", None)
    embedding = get_embedding() if get_embedding is not None else None
    return next((n for n, m in model.named_modules() if m is embedding and type(m) is nn.Embedding), None)
