"""Attention for decoding with a static cache in transformers: ``attn_implementation="higgs_sdpa"``.

Imported by ``import higgs`` as soon as transformers is there. transformers' "sdpa" copies keys and values for each of
the query heads that share them wherever there is a mask, which a static cache always has: of Llama-3.1-8B four times
the cache, in every layer and step. Here the query heads of a key head are rows of one query instead.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "higgs_sdpa"  # with "sdpa" in it transformers refuses models that do not support SDPA


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' ``sdpa_attention_forward`` computes, with the arguments that it gets.

    ``query`` [b, heads, m, head_dim], ``key`` and ``value`` [b, key heads, s, head_dim], ``attention_mask`` None or
    broadcastable to [b, heads, m, s]; the result is [b, m, heads, head_dim]. Where each sequence has one new token
    (m = 1), a mask that all heads share and more heads than key heads, keys and values are read once and never copied;
    all else goes to transformers.
    """
    batch, heads, m, _ = query.shape
    shared_mask = attention_mask is not None and attention_mask.shape[1] == 1
    if m > 1 or not shared_mask or heads == key.shape[1] or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    grouped = query.reshape(batch, key.shape[1], -1, query.shape[-1])
    y = scaled_dot_product_attention(grouped, key, value, attention_mask, dropout_p=dropout, scale=scaling)
    return y.reshape(batch, 1, heads, y.shape[-1]), None


AttentionInterface.register(NAME, grouped_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
