"""Attention for decoding with a static cache in transformers: ``attn_implementation="higgs_sdpa"``.

Imported by ``import higgs`` as soon as transformers is there. transformers' "sdpa" copies keys and values for each of
the query heads that share them wherever there is a mask, which a static cache always has: of Llama-3.1-8B four times
the cache, in every layer and step. Here nothing is copied: on Hopper the kernels of cuDNN know of shared keys,
elsewhere the query heads of a key head are rows of one query.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "higgs_sdpa"  # with "sdpa" in it transformers refuses models that do not support SDPA
_SEEN = torch.__version__ >= "2.11"  # (as versions) where cuDNN was seen to take a mask and shared keys
_capability = functools.cache(torch.cuda.get_device_capability)


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
    batch, heads, m, head_dim = query.shape
    shared_mask = attention_mask is not None and attention_mask.shape[1] == 1
    if m > 1 or not shared_mask or heads == key.shape[1] or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    native = query.dtype != torch.float32 and head_dim <= 128 and _cudnn_comes_first(query.device)
    if not native:
        query = query.reshape(batch, key.shape[1], -1, head_dim)
    y = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=native
    )
    return y.reshape(batch, 1, heads, y.shape[-1]), None


@torch.compiler.assume_constant_result
def _cudnn_comes_first(device: torch.device) -> bool:
    """Whether SDPA prefers cuDNN's kernel. No other takes a mask and shared keys: PyTorch then copies."""
    enabled = device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled() and _SEEN
    return enabled and _capability(device)[0] in (9, 10)


AttentionInterface.register(NAME, grouped_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
