"""The torch operators of higgs, and the only place that touches ``higgs._core``.

Declared with ``torch.library.Library.define`` / ``impl`` (2-3 us a call) on data pointers: no link to libtorch, so one
binary serves every torch version. C++ checks shapes and values; what only torch knows (device, dtype, contiguity) is
checked here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import _core
from .errors import UnsupportedError

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class LayerFormat:
    """How a weight matrix W[n, k] is stored (FORMAT.md). Made by :func:`layer_format`."""

    grid: str
    n: int
    k: int
    block: int
    group: int
    seed: int

    @property
    def row_bytes(self) -> int:
        """Bytes of indices of one row."""
        return _core.check_format(self.grid, self.n, self.k, self.block, self.group)[0]

    @property
    def row_groups(self) -> int:
        """Scales of one row."""
        return _core.check_format(self.grid, self.n, self.k, self.block, self.group)[1]

    def bits(self, column_scale: bool = False) -> float:
        """Effective bits per weight, scales (and column scale, if any) counted."""
        return _core.format_bits(self.grid, self.n, self.k, self.block, self.group, column_scale)

    def stored_bytes(self, column_scale: bool = False) -> int:
        return self.n * (self.row_bytes + 2 * self.row_groups) + (2 * self.k if column_scale else 0)

    def with_rows(self, n: int) -> LayerFormat:
        return replace(self, n=n)


def layer_format(
    n: int, k: int, grid: str, *, block: int | None = None, group: int | None = None, seed: int = 0
) -> LayerFormat:
    """The format of an [n, k] matrix on ``grid``, with the default block and group where none is given.

    Raises ValueError for an unknown grid, k not a positive multiple of 64, or an illegal block or group.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} is not supported; use 0 to 2**63 - 1")
    block = _core.default_block(k) if block is None else block
    group = _core.default_group(k, block) if group is None else group
    _core.check_format(grid, n, k, block, group)
    return LayerFormat(grid, n, k, block, group, seed)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.device.type != "cpu":
        raise UnsupportedError(f"{name} is on {tensor.device}; only the CPU is supported so far")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}; use {' or '.join(map(str, dtypes))}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def _check_packed(indices: Tensor, scales: Tensor, column_scale: Tensor | None, fmt: LayerFormat) -> None:
    _check("indices", indices, (fmt.n, fmt.row_bytes), (torch.uint8,))
    _check("scales", scales, (fmt.n, fmt.row_groups), (torch.float16,))
    if column_scale is not None:
        _check("column_scale", column_scale, (fmt.k,), (torch.float16,))
    if not (indices.is_contiguous() and scales.is_contiguous()):
        raise ValueError("indices and scales must be contiguous")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _format_of(indices: Tensor, grid: str, block: int, group: int, seed: int) -> LayerFormat:
    g = _core.find_grid(grid)
    return LayerFormat(grid, indices.shape[0], indices.shape[1] * 8 // g.index_bits * g.p, block, group, seed)


def quantize(weight: Tensor, fmt: LayerFormat, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Quantizes ``weight`` [n, k] (float32, float16 or bfloat16, finite; arXiv 2411.17525, algorithm 1).

    Returns ``indices`` uint8 [n, row_bytes], ``scales`` float16 [n, row_groups] and t2, the relative squared error (in
    the column-scaled space if there is a ``column_scale``, float16 [k]).
    """
    _check("weight", weight, (fmt.n, fmt.k), tuple(_DTYPE_CODES))
    if column_scale is not None:
        _check("column_scale", column_scale, (fmt.k,), (torch.float16,))
    weight = weight.detach().contiguous()
    indices = torch.empty(fmt.n, fmt.row_bytes, dtype=torch.uint8)
    scales = torch.empty(fmt.n, fmt.row_groups, dtype=torch.float16)
    t2 = _core.quantize(
        fmt.grid, fmt.n, fmt.k, fmt.block, fmt.group, fmt.seed, weight.data_ptr(), _DTYPE_CODES[weight.dtype],
        _address(column_scale), indices.data_ptr(), scales.data_ptr(),
    )  # fmt: skip
    return indices, scales, t2


def _linear_cpu(
    x: Tensor, indices: Tensor, scales: Tensor, column_scale: Tensor | None, bias: Tensor | None,
    grid: str, block: int, group: int, seed: int,
) -> Tensor:  # fmt: skip
    fmt = _format_of(indices, grid, block, group, seed)
    _check_packed(indices, scales, column_scale, fmt)
    if x.dtype not in _DTYPE_CODES:
        raise TypeError(f"x is {x.dtype}; use torch.float32, torch.float16 or torch.bfloat16")
    if x.shape[-1] != fmt.k:
        raise ValueError(f"x has {x.shape[-1]} features, the layer has in_features = {fmt.k}")
    if bias is not None:
        _check("bias", bias, (fmt.n,), tuple(_DTYPE_CODES))
        bias = bias.to(x.dtype).contiguous()
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], fmt.n, dtype=x.dtype)
    code = _DTYPE_CODES[x.dtype]
    _core.linear(
        grid, fmt.n, fmt.k, block, group, seed, indices.data_ptr(), scales.data_ptr(), _address(column_scale),
        x.data_ptr(), code, x.numel() // fmt.k, _address(bias), y.data_ptr(), code,
    )  # fmt: skip
    return y


def _dequantize_cpu(
    indices: Tensor, scales: Tensor, column_scale: Tensor | None,
    grid: str, block: int, group: int, seed: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    fmt = _format_of(indices, grid, block, group, seed)
    _check_packed(indices, scales, column_scale, fmt)
    if dtype not in _DTYPE_CODES:
        raise TypeError(f"dtype is {dtype}; use torch.float32, torch.float16 or torch.bfloat16")
    out = torch.empty(fmt.n, fmt.k, dtype=dtype)
    _core.dequantize(
        grid, fmt.n, fmt.k, block, group, seed, indices.data_ptr(), scales.data_ptr(), _address(column_scale),
        out.data_ptr(), _DTYPE_CODES[dtype],
    )  # fmt: skip
    return out


_library = torch.library.Library("higgs", "DEF")
_library.define(
    "linear(Tensor x, Tensor indices, Tensor scales, Tensor? column_scale, Tensor? bias,"
    " str grid, int block, int group, int seed) -> Tensor"
)
_library.define(
    "dequantize(Tensor indices, Tensor scales, Tensor? column_scale,"
    " str grid, int block, int group, int seed, ScalarType dtype) -> Tensor"
)
_library.impl("linear", _linear_cpu, "CPU")
_library.impl("dequantize", _dequantize_cpu, "CPU")


@torch.library.register_fake("higgs::linear", lib=_library)
def _linear_fake(x, indices, scales, column_scale, bias, grid, block, group, seed):
    return x.new_empty(*x.shape[:-1], indices.shape[0])


@torch.library.register_fake("higgs::dequantize", lib=_library)
def _dequantize_fake(indices, scales, column_scale, grid, block, group, seed, dtype):
    g = _core.find_grid(grid)
    return indices.new_empty(indices.shape[0], indices.shape[1] * 8 // g.index_bits * g.p, dtype=dtype)


def _linear_setup(ctx, inputs, output) -> None:
    x, indices, scales, column_scale, bias, *ctx.format = inputs
    ctx.has_bias = bias is not None and bias.requires_grad
    ctx.save_for_backward(indices, scales, column_scale)
    ctx.x_dtype = x.dtype


def _linear_backward(ctx, grad):
    """dx = dy @ W^; the packed tensors are constants."""
    indices, scales, column_scale = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.higgs.dequantize(indices, scales, column_scale, *ctx.format, ctx.x_dtype)
        grad_x = grad @ weight
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
    return grad_x, None, None, None, grad_bias, None, None, None, None


torch.library.register_autograd("higgs::linear", _linear_backward, setup_context=_linear_setup, lib=_library)

linear = torch.ops.higgs.linear
dequantize = torch.ops.higgs.dequantize
