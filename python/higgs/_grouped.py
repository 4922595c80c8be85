"""The operators for experts of a mixture: many matrices of one format, of which every row of x meets one.

The matrices lie one below the other, as rows of one packed matrix [experts * n, k]. x [t, k] is sorted by expert:
``offsets`` int32 [experts] says where the rows of each expert end. y is [t, n].

    grouped_linear        stored layout; on CUDA it is repacked in every call
    grouped_linear_tiled  CUDA only: the layout the kernels read. Nothing is read back to the host, except by torch's
                          grouped matmul, which takes what the kernels do not, in other dtypes than bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from . import _core, _cuda
from ._cuda import _aligned, _launch, _rotate, _tiled_formats
from ._formats import DTYPE_CODES, LayerFormat, address, check, check_packed, check_x, code_of, core_format, format_of

__all__ = ["grouped_linear", "grouped_linear_tiled", "tiled_linear"]

_OFFSETS = (torch.int32,)
_DECODED_BYTES = 1 << 30  # of weights decoded at once where the kernels do not multiply themselves


def _check(x: Tensor, offsets: Tensor, fmt: LayerFormat, like: Tensor) -> None:
    check_x(x, fmt.k, like)
    if x.dim() != 2:
        raise ValueError(f"x has shape {list(x.shape)}, expected [rows sorted by expert, {fmt.k}]")
    check("offsets", offsets, (offsets.numel(),), _OFFSETS, like)
    if fmt.n % max(1, offsets.numel()):
        raise ValueError(f"{offsets.numel()} experts cannot share {fmt.n} rows of weights")


def _cpu_linear(
    x: Tensor, offsets: Tensor, indices: Tensor, scales: Tensor, column_scale: Tensor | None,
    grid: str, block: int, group: int, seed: int,
) -> Tensor:  # fmt: skip
    fmt = format_of(indices, grid, block, group, seed)
    check_packed(indices, scales, column_scale, fmt)
    _check(x, offsets, fmt, indices)
    x, offsets = x.contiguous(), offsets.contiguous()
    experts = offsets.numel()
    y = x.new_empty(len(x), fmt.n // max(1, experts))
    _core.grouped_linear(
        core_format(fmt), address(indices), address(scales), address(column_scale), address(x), code_of(x.dtype),
        len(x), address(offsets), experts, address(y),
    )  # fmt: skip
    return y


def _cpu_grad(
    grad: Tensor, offsets: Tensor, indices: Tensor, scales: Tensor, column_scale: Tensor | None,
    grid: str, block: int, group: int, seed: int,
) -> Tensor:  # fmt: skip
    """Gradient of x: the weights of the experts in use are decoded one after another."""
    fmt = format_of(indices, grid, block, group, seed)
    n = fmt.n // offsets.numel()
    grad_x = grad.new_zeros(len(grad), fmt.k)
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > begin:
            rows = slice(expert * n, (expert + 1) * n)
            weight = torch.ops.higgs.dequantize(
                indices[rows], scales[rows], column_scale, grid, block, group, seed, grad.dtype
            )
            torch.mm(grad[begin:end], weight, out=grad_x[begin:end])
        begin = end
    return grad_x


def _cuda_linear(
    x: Tensor, offsets: Tensor, indices: Tensor, scales: Tensor, column_scale: Tensor | None,
    grid: str, block: int, group: int, seed: int,
) -> Tensor:  # fmt: skip
    fmt = format_of(indices, grid, block, group, seed)
    check_packed(indices, scales, column_scale, fmt)
    tiled, vector = _cuda.repack(indices, scales, fmt), _cuda.input_vector(column_scale, fmt, indices.device)
    return tiled_linear(x, offsets, tiled, vector, grid, fmt.n, group, block)


def _cuda_grad(
    grad: Tensor, offsets: Tensor, indices: Tensor, scales: Tensor, column_scale: Tensor | None,
    grid: str, block: int, group: int, seed: int,
) -> Tensor:  # fmt: skip
    fmt = format_of(indices, grid, block, group, seed)
    tiled, vector = _cuda.repack(indices, scales, fmt), _cuda.input_vector(column_scale, fmt, indices.device)
    return _tiled_grad(grad, offsets, tiled, vector, grid, fmt.n, group, block)


def tiled_linear(
    x: Tensor, offsets: Tensor, tiled: Tensor, input_vector: Tensor, grid: str, rows: int, group: int, block: int
) -> Tensor:
    """Up to ``_max_rows`` rows of x (about 80 an expert): a kernel that decodes the weights of the experts in use.
    More, float32, and what the kernel does not take (trellis grids): all weights are decoded, in pieces, and multiplied
    by torch."""
    fmt = LayerFormat(grid, rows, input_vector.shape[0], block, group, 0)
    _check(x, offsets, fmt, input_vector)
    (core,) = _tiled_formats([tiled], input_vector, [grid], [rows], [group], block)
    x, offsets = _aligned(x), offsets.contiguous()
    experts, code = offsets.numel(), DTYPE_CODES[x.dtype]
    n = rows // experts
    if len(x) > _max_rows(core, experts, code, x.device.index):
        return _decoded_linear(x, offsets, core, tiled, input_vector, n, block)
    y = x.new_empty(len(x), n)
    if len(x):
        workspace = torch.empty_like(x)
        _launch(
            x.device, _core.cuda_grouped_linear, core, experts, address(tiled), address(x), code, len(x),
            address(input_vector), address(offsets), address(y), address(workspace),
        )  # fmt: skip
    return y


def _tiled_grad(
    grad: Tensor, offsets: Tensor, tiled: Tensor, input_vector: Tensor, grid: str, rows: int, group: int, block: int
) -> Tensor:
    """Gradient of x: d * T(grad_y @ scale * point), the transform T being its own inverse."""
    (core,) = _tiled_formats([tiled], input_vector, [grid], [rows], [group], block)
    experts, k = offsets.numel(), input_vector.shape[0]
    total = torch.zeros(len(grad), k, dtype=torch.float32, device=grad.device)
    for columns, weights in _decoded_pieces(core, tiled, experts, rows // experts, k, grad.dtype):
        total += _grouped_mm(grad[:, columns].contiguous(), weights, offsets)
    return (_rotate(total, None, block, torch.float32) * input_vector).to(grad.dtype)


@cache
def _max_rows(core: _core.Format, experts: int, code: int, device: int) -> int:
    """Up to how many rows of x the kernel is the way to go."""
    with torch.cuda.device(device):
        return _core.cuda_grouped_linear_max_rows(core, experts, code)


def _decoded_linear(
    x: Tensor, offsets: Tensor, core: _core.Format, tiled: Tensor, input_vector: Tensor, n: int, block: int
) -> Tensor:
    rotated = _rotate(x, input_vector, block, x.dtype)
    y = x.new_empty(len(x), n)
    for columns, weights in _decoded_pieces(core, tiled, offsets.numel(), n, x.shape[1], x.dtype):
        y[:, columns] = _grouped_mm(rotated, weights.transpose(1, 2), offsets)
    return y


def _decoded_pieces(
    core: _core.Format, tiled: Tensor, experts: int, n: int, k: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows of each expert, scale * point [experts, rows, k]), all in one buffer."""
    fits = max(1, _DECODED_BYTES // (experts * k * dtype.itemsize * _cuda._TILE_ROWS)) * _cuda._TILE_ROWS
    buffer = torch.empty(experts * min(n, fits) * k, dtype=dtype, device=tiled.device)
    for first in range(0, n, fits):
        piece = buffer[: experts * min(fits, n - first) * k].view(experts, -1, k)
        for e, out in enumerate(piece if n > fits else [piece.view(-1, k)]):
            _launch(
                tiled.device, _core.cuda_dequantize_rotated_tiled, core, address(tiled), e * n + first, len(out),
                address(out), code_of(dtype),
            )  # fmt: skip
        yield slice(first, first + piece.shape[1]), piece


def _grouped_mm(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Rows of x, grouped by ``offsets``, times ``weights`` [experts, k, n]."""
    call = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return call(x, weights, offs=offsets)


_library = torch.library.Library("higgs", "FRAGMENT")
_STORED = "Tensor indices, Tensor scales, Tensor? column_scale, str grid, int block, int group, int seed"
_TILED = "Tensor tiled, Tensor input_vector, str grid, int rows, int group, int block"
_library.define(f"grouped_linear(Tensor x, Tensor offsets, {_STORED}) -> Tensor")
_library.define(f"grouped_linear_grad(Tensor grad, Tensor offsets, {_STORED}) -> Tensor")
_library.define(f"grouped_linear_tiled(Tensor x, Tensor offsets, {_TILED}) -> Tensor")
_library.define(f"grouped_linear_tiled_grad(Tensor grad, Tensor offsets, {_TILED}) -> Tensor")
_library.impl("grouped_linear", _cpu_linear, "CPU")
_library.impl("grouped_linear_grad", _cpu_grad, "CPU")
_library.impl("grouped_linear", _cuda_linear, "CUDA")
_library.impl("grouped_linear_grad", _cuda_grad, "CUDA")
_library.impl("grouped_linear_tiled", tiled_linear, "CUDA")
_library.impl("grouped_linear_tiled_grad", _tiled_grad, "CUDA")


@torch.library.register_fake("higgs::grouped_linear", lib=_library)
def _linear_fake(x, offsets, indices, scales, column_scale, grid, block, group, seed):
    return x.new_empty(x.shape[0], indices.shape[0] // offsets.shape[0])


@torch.library.register_fake("higgs::grouped_linear_grad", lib=_library)
def _grad_fake(grad, offsets, indices, scales, column_scale, grid, block, group, seed):
    g = _core.find_grid(grid)
    return grad.new_empty(grad.shape[0], indices.shape[1] * 8 // g.index_bits * g.p)


@torch.library.register_fake("higgs::grouped_linear_tiled", lib=_library)
def _tiled_fake(x, offsets, tiled, input_vector, grid, rows, group, block):
    return x.new_empty(x.shape[0], rows // offsets.shape[0])


@torch.library.register_fake("higgs::grouped_linear_tiled_grad", lib=_library)
def _tiled_grad_fake(grad, offsets, tiled, input_vector, grid, rows, group, block):
    return grad.new_empty(grad.shape[0], input_vector.shape[0])


def _setup(ctx, inputs, output) -> None:
    _, *packed = inputs
    ctx.tensors = [isinstance(value, Tensor) for value in packed]
    ctx.save_for_backward(*(value for value in packed if isinstance(value, Tensor)))
    ctx.others = [value for value in packed if not isinstance(value, Tensor)]


def _backward_of(name: str):
    def backward(ctx, grad):
        """The packed tensors are constants."""
        nothing = [None] * len(ctx.tensors)
        if not ctx.needs_input_grad[0]:
            return None, *nothing
        saved, others = iter(ctx.saved_tensors), iter(ctx.others)
        packed = [next(saved) if is_tensor else next(others) for is_tensor in ctx.tensors]
        return getattr(torch.ops.higgs, name)(grad.contiguous(), *packed), *nothing

    return backward


for _name in ("grouped_linear", "grouped_linear_tiled"):
    torch.library.register_autograd(
        f"higgs::{_name}", _backward_of(f"{_name}_grad"), setup_context=_setup, lib=_library
    )

grouped_linear = torch.ops.higgs.grouped_linear
grouped_linear_tiled = torch.ops.higgs.grouped_linear_tiled
