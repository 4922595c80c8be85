"""The operators on the CPU, where kernels read the stored layout."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _core
from ._formats import (
    DTYPE_CODES,
    LayerFormat,
    address,
    check,
    check_packed,
    check_x,
    code_of,
    core_format,
    format_of,
)


def quantize(weight: Tensor, fmt: LayerFormat, column_scale: Tensor | None) -> tuple[Tensor, Tensor, float]:
    indices = torch.empty(fmt.n, fmt.row_bytes, dtype=torch.uint8)
    scales = torch.empty(fmt.n, fmt.row_groups, dtype=torch.float16)
    t2 = _core.quantize(
        core_format(fmt), address(weight), code_of(weight.dtype), address(column_scale), address(indices),
        address(scales),
    )  # fmt: skip
    return indices, scales, t2


def linear(
    x: Tensor, indices: Tensor, scales: Tensor, column_scale: Tensor | None, bias: Tensor | None,
    grid: str, block: int, group: int, seed: int,
) -> Tensor:  # fmt: skip
    fmt = format_of(indices, grid, block, group, seed)
    check_packed(indices, scales, column_scale, fmt)
    check_x(x, fmt.k, indices)
    if bias is not None:
        check("bias", bias, (fmt.n,), DTYPE_CODES, indices)
        bias = bias.to(x.dtype).contiguous()
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], fmt.n, dtype=x.dtype)
    _core.linear(
        core_format(fmt), address(indices), address(scales), address(column_scale), address(x), code_of(x.dtype),
        x.numel() // fmt.k, address(bias), address(y),
    )  # fmt: skip
    return y


def dequantize(
    indices: Tensor, scales: Tensor, column_scale: Tensor | None,
    grid: str, block: int, group: int, seed: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    fmt = format_of(indices, grid, block, group, seed)
    check_packed(indices, scales, column_scale, fmt)
    out = torch.empty(fmt.n, fmt.k, dtype=dtype)
    _core.dequantize(
        core_format(fmt), address(indices), address(scales), address(column_scale), address(out), code_of(dtype)
    )
    return out
