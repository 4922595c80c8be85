"""Column shards of a layer, as tensor parallelism makes them."""

from __future__ import annotations

import higgs
import pytest
import torch
from higgs import HiggsLinear, layer_format
from higgs.linear import constant
from torch import nn

CASES = [  # grid, k, block, group, columns of a shard
    ("p2_n256", 512, 64, 128, 128), ("p1_n8", 1024, 256, 512, 512), ("p4_n64", 384, 64, 192, 192),
    ("p2_n1024", 1152, 576, 576, 576), ("a2_b6", 1024, 64, 256, 256), ("t2_b5", 1536, 128, 128, 512),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "k", "block", "group", "width"), CASES)
@pytest.mark.parametrize("seed", [0, 2**53 - 1, 2**63 - 1])
@pytest.mark.parametrize("scaled", [False, True])
def test_columns_of_a_layer(grid: str, k: int, block: int, group: int, width: int, seed: int, scaled: bool) -> None:
    """Shards have slices of the layer's bytes, the same weights bit for bit, and outputs that sum to the layer's."""
    torch.manual_seed(0)
    linear, x = nn.Linear(k, 24, bias=False), torch.randn(3, k)
    column_scale = (torch.rand(k) + 0.5).half() if scaled else None
    fmt = layer_format(24, k, grid, block=block, group=group, seed=seed)
    layer, _ = HiggsLinear.from_linear(linear, fmt, column_scale)
    weight, total = layer.dequantize(), torch.zeros(3, 24)
    for first in range(0, k, width):
        own = fmt.with_columns(first, width)
        columns = slice(first, first + width)
        shard = HiggsLinear(own, column_scale=scaled)
        start = first * fmt.row_bytes // k
        shard.indices = constant(layer.indices[:, start : start + own.row_bytes].contiguous())
        shard.scales = constant(layer.scales[:, first // group : first // group + own.row_groups].contiguous())
        if column_scale is not None:
            shard.column_scale = constant(column_scale[columns])
        assert torch.equal(shard.dequantize(), weight[:, columns])
        total += shard(x[:, columns])
        scale = None if column_scale is None else column_scale[columns]
        part = nn.Linear(width, 24, bias=False)
        part.weight = nn.Parameter(linear.weight[:, columns].contiguous())
        requantized, _ = HiggsLinear.from_linear(part, own, scale)
        assert torch.equal(requantized.indices, shard.indices)
        assert torch.equal(requantized.scales, shard.scales)
    torch.testing.assert_close(total, layer(x), rtol=1e-4, atol=1e-4)


def test_columns_compiled() -> None:
    """A shard's seed may be negative, as the operators take it."""
    own = layer_format(16, 256, "p2_n16", block=64, group=64, seed=5).with_columns(64, 128)
    assert own.seed < 0
    layer, x = HiggsLinear.from_linear(nn.Linear(128, 16), own)[0], torch.randn(2, 128)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize(
    ("grid", "first", "k", "step"),
    [
        ("p2_n256", 64, 128, 128), ("p2_n256", 128, 192, 128), ("a2_b8", 128, 256, 256), ("a2_b8", 0, 128, 256),
        ("t2_b8", 256, 256, 512), ("t2_b8", 0, 512, 512), ("t4_b8", 256, 512, 512),
    ],
)  # fmt: skip
def test_columns_that_cut_a_group(grid: str, first: int, k: int, step: int) -> None:
    fmt = layer_format(4, 768, grid, block=64, group=128)
    message = rf"columns {first} to {first + k} of 768 .* scale group 128 \(block 64\) .* multiple of {step} columns"
    with pytest.raises(ValueError, match=message):
        fmt.with_columns(first, k)


def test_last_group_may_be_short() -> None:
    fmt = higgs.layer_format(4, 320, "p2_n16", block=64, group=256)
    assert fmt.with_columns(0, 320) == fmt
    assert fmt.with_columns(0, 256).row_groups == 1


def test_last_run_may_be_long() -> None:
    fmt = higgs.layer_format(4, 1280, "t2_b8", block=64, group=256)
    assert fmt.with_columns(512, 768).k == 768
    with pytest.raises(ValueError, match="512 or more before the end"):
        fmt.with_columns(0, 1024)
