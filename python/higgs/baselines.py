"""Round-to-nearest and NF4, the data-free methods users compare with, on simulated weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .energies import linear_layers

# The 16 levels of NF4 (QLoRA, arXiv 2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def round_to_nearest(weight: Tensor, bits: int, group: int = 64) -> Tensor:
    """Asymmetric min/max integers of ``bits`` bits in groups of ``group`` inputs, fp16 scale and integer zero point:
    bits + (16 + bits) / group bits a weight. weight [n, k] with k divisible by group; returns the rounded weight."""
    w = weight.float().view(weight.shape[0], -1, group)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    levels = 2**bits - 1
    scale = ((high - low) / levels).half().float().clamp(min=1e-8)
    zero = (-low / scale).round().clamp(0, levels)
    q = ((w / scale).round() + zero).clamp(0, levels)
    return ((q - zero) * scale).view(weight.shape).to(weight.dtype)


def nf4(weight: Tensor, group: int = 64) -> Tensor:
    """NF4 with one absmax per ``group`` inputs (fp16 here, 4.25 bits a weight). Returns the rounded weight [n, k]."""
    levels = torch.tensor(_NF4)
    borders = (levels[1:] + levels[:-1]) / 2
    w = weight.float().view(weight.shape[0], -1, group)
    scale = w.abs().amax(-1, keepdim=True).half().float().clamp(min=1e-8)
    return (levels[torch.bucketize(w / scale, borders)] * scale).view(weight.shape).to(weight.dtype)


def apply_(model: nn.Module, method: str, bits: int = 4, group: int = 64) -> float:
    """Rounds the weights of every Linear layer but the output head in place; returns the bits a weight.

    ``method``: "rtn" (round to nearest, ``bits`` bits) or "nf4".
    """
    if method not in ("rtn", "nf4"):
        raise ValueError(f"method {method!r}; use 'rtn' or 'nf4'")
    for name, linear in linear_layers(model).items():
        if linear.in_features % group != 0:
            raise ValueError(f"layer {name}: in_features {linear.in_features} is not a multiple of group {group}")
        weight = linear.weight.data
        weight.copy_(round_to_nearest(weight, bits, group) if method == "rtn" else nf4(weight, group))
    return bits + (16 + bits) / group if method == "rtn" else 4 + 16 / group
