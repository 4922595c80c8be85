"""The operators on CUDA devices.

Kernels read the *tiled* layout, a flat uint8 tensor that :func:`repack` makes of the stored one. All work goes to
torch's current stream of the tensors' device and all memory comes from torch's allocator, so calls can be captured in a
CUDA graph.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _core, _cpu
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
from .errors import UnsupportedError

_CHUNK_BYTES = 64 << 20  # weights decoded at once where the kernels do not multiply themselves
_TILE_ROWS = 16
_BYTES, _VECTOR = (torch.uint8,), (torch.float32,)


def _launch(device: torch.device, call: Any, *arguments: Any) -> None:
    """``call(*arguments, stream)`` on torch's current stream of ``device``."""
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    if device.index == torch.cuda.current_device():
        call(*arguments, stream)
    else:
        with torch.cuda.device(device):
            call(*arguments, stream)


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as the kernels need it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def quantize(weight: Tensor, fmt: LayerFormat, column_scale: Tensor | None) -> tuple[Tensor, Tensor, float]:
    if column_scale is not None:
        bad = (~(column_scale.isfinite() & (column_scale > 0))).nonzero()
        if len(bad):
            at = int(bad[0])
            raise ValueError(f"column_scale[{at}] is {column_scale[at].item()}; column scales are positive and finite")
    indices, scales = _empty_stored(fmt, weight.device)
    stats = torch.empty(fmt.n, 2, dtype=torch.float64, device=weight.device)  # squared error and energy of each row
    weight = _aligned(weight)
    try:
        _launch(
            weight.device, _core.cuda_quantize, core_format(fmt), address(weight), code_of(weight.dtype),
            address(column_scale), address(indices), address(scales), address(stats),
        )  # fmt: skip
    except UnsupportedError:
        if not _core.with_cuda:
            raise
        # A trellis grid by hash, or a row that does not fit in shared memory.
        return _quantize_on_the_cpu(weight, fmt, column_scale)
    error, energy = stats.sum(0).tolist()
    if not (math.isfinite(error) and math.isfinite(energy)):
        _explain(weight, stats)
    return indices, scales, error / energy if energy > 0 else 0.0


def _quantize_on_the_cpu(weight: Tensor, fmt: LayerFormat, column_scale: Tensor | None) -> tuple[Tensor, Tensor, float]:
    scale = None if column_scale is None else column_scale.cpu()
    indices, scales, t2 = _cpu.quantize(weight.cpu(), fmt, scale)
    return indices.to(weight.device), scales.to(weight.device), t2


def _empty_stored(fmt: LayerFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    indices = torch.empty(fmt.n, fmt.row_bytes, dtype=torch.uint8, device=device)
    return indices, torch.empty(fmt.n, fmt.row_groups, dtype=torch.float16, device=device)


def _explain(weight: Tensor, stats: Tensor) -> None:
    bad = (~weight.isfinite()).nonzero()
    if len(bad):
        at = bad[0].tolist()
        raise ValueError(f"weight {at} is {weight[tuple(at)].item()}; only finite weights can be quantized")
    row = (~stats.isfinite()).any(1).nonzero()[0].item()
    raise ValueError(f"a scale of row {row} does not fit in fp16 (at most 65504)")


def dequantize(
    indices: Tensor, scales: Tensor, column_scale: Tensor | None,
    grid: str, block: int, group: int, seed: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    fmt = format_of(indices, grid, block, group, seed)
    check_packed(indices, scales, column_scale, fmt)
    out = torch.empty(fmt.n, fmt.k, dtype=dtype, device=indices.device)
    _launch(
        indices.device, _core.cuda_dequantize, core_format(fmt), address(indices), address(scales),
        address(column_scale), address(out), code_of(dtype),
    )  # fmt: skip
    return out


def repack(indices: Tensor, scales: Tensor, fmt: LayerFormat) -> Tensor:
    """Stored layout -> tiled layout, uint8 [bytes]."""
    check_packed(indices, scales, None, fmt)
    core = core_format(fmt)
    tiled = torch.empty(_core.cuda_tiled_bytes(core), dtype=torch.uint8, device=indices.device)
    _launch(indices.device, _core.cuda_repack, core, address(indices), address(scales), address(tiled))
    return tiled


def unrepack(tiled: Tensor, fmt: LayerFormat) -> tuple[Tensor, Tensor]:
    """Tiled layout -> ``indices`` and ``scales`` of the stored one, the bytes that :func:`repack` was given."""
    core = core_format(fmt)
    check("tiled", tiled, (_core.cuda_tiled_bytes(core),), _BYTES, tiled)
    indices, scales = _empty_stored(fmt, tiled.device)
    _launch(tiled.device, _core.cuda_unrepack, core, address(tiled), address(indices), address(scales))
    return indices, scales


def input_vector(column_scale: Tensor | None, fmt: LayerFormat, device: torch.device) -> Tensor:
    """d = sign / column_scale, float32 [k]: what x is multiplied by before it is rotated."""
    d = torch.empty(fmt.k, dtype=torch.float32, device=device)
    _launch(d.device, _core.cuda_input_vector, core_format(fmt), address(column_scale), address(d))
    return d


def linear(
    x: Tensor, indices: Tensor, scales: Tensor, column_scale: Tensor | None, bias: Tensor | None,
    grid: str, block: int, group: int, seed: int,
) -> Tensor:  # fmt: skip
    """From the stored layout: repacked in every call, for tensors that stay in it (weights offloaded to the CPU)."""
    fmt = format_of(indices, grid, block, group, seed)
    check_packed(indices, scales, column_scale, fmt)
    tiled, vector = repack(indices, scales, fmt), input_vector(column_scale, fmt, indices.device)
    biases = [] if bias is None else [bias]
    return linear_tiled(x, [tiled], vector, biases, [bias is not None], [grid], [fmt.n], [group], block)[0]


def linear_tiled(
    x: Tensor, tiled: list[Tensor], input_vector: Tensor, biases: list[Tensor], has_bias: list[bool],
    grids: list[str], rows: list[int], groups: list[int], block: int,
) -> list[Tensor]:  # fmt: skip
    """Up to ``linear_max_rows`` rows of x: the kernels. More (for float32, for trellis grids by hash and, on other GPUs
    than sm_90, for m > 512, 16 of a trellis): x is rotated once, the weights are decoded in pieces of at most 64 MiB
    and multiplied by torch."""
    k = input_vector.shape[0]
    check_x(x, k, input_vector)
    check("input_vector", input_vector, (k,), _VECTOR, x)
    formats = _tiled_formats(tiled, input_vector, grids, rows, groups, block)
    given = iter(biases)
    prepared = [_prepared_bias(next(given), n, x) if has else None for has, n in zip(has_bias, rows, strict=True)]
    x = _aligned(x)
    m, code = x.numel() // k, DTYPE_CODES[x.dtype]
    if m > _max_rows(formats, code, x.device.index):
        rotated = _rotate(x.view(-1, k), input_vector, block, x.dtype)
        parts = zip(formats, tiled, prepared, rows, strict=True)
        ys = [_matmul_rotated(rotated, core, weights, bias, n) for core, weights, bias, n in parts]
        return [y.view(*x.shape[:-1], n) for y, n in zip(ys, rows, strict=True)]
    ys = [x.new_empty((*x.shape[:-1], n)) for n in rows]
    if m == 0:
        return ys
    need = _workspace_bytes(formats, m, code, x.device.index)
    workspace = x.new_empty(need, dtype=torch.uint8) if need else None
    _launch(
        x.device, _core.cuda_linear, formats, [t.data_ptr() for t in tiled], [address(b) for b in prepared],
        [y.data_ptr() for y in ys], x.data_ptr(), code, m, input_vector.data_ptr(), address(workspace),
    )  # fmt: skip
    return ys


def linear_tiled_grad(
    grads: list[Tensor], tiled: list[Tensor], input_vector: Tensor,
    grids: list[str], groups: list[int], block: int,
) -> Tensor:  # fmt: skip
    """Gradient of x: d * T(sum of grad_y @ scale * point), the transform T being its own inverse."""
    k = input_vector.shape[0]
    rows = [grad.shape[-1] for grad in grads]
    formats = _tiled_formats(tiled, input_vector, grids, rows, groups, block)
    m = math.prod(grads[0].shape[:-1])
    total = torch.zeros(m, k, dtype=torch.float32, device=input_vector.device)
    for grad, core, weights, n in zip(grads, formats, tiled, rows, strict=True):
        for first, piece in _decoded(core, weights, n, k, grad.dtype):
            total += grad.reshape(m, n)[:, first : first + len(piece)] @ piece
    grad_x = _rotate(total, None, block, torch.float32) * input_vector
    return grad_x.to(grads[0].dtype).view(*grads[0].shape[:-1], k)


@cache
def _tiled_format(grid: str, n: int, k: int, block: int, group: int) -> tuple[_core.Format, int]:
    """The format and the bytes of its tiled layout. The seed is not in these bytes but in the input vector."""
    core = _core.Format(grid, n, k, block, group, 0)
    return core, _core.cuda_tiled_bytes(core)


def _tiled_formats(
    tiled: list[Tensor], input_vector: Tensor, grids: list[str], rows: list[int], groups: list[int], block: int
) -> tuple[_core.Format, ...]:
    formats = []
    for weights, grid, n, group in zip(tiled, grids, rows, groups, strict=True):
        core, nbytes = _tiled_format(grid, n, input_vector.shape[0], block, group)
        check("tiled", weights, (nbytes,), _BYTES, input_vector)
        formats.append(core)
    return tuple(formats)


@lru_cache(maxsize=4096)
def _max_rows(formats: tuple[_core.Format, ...], code: int, device: int) -> int:
    with torch.cuda.device(device):
        return min(_core.cuda_linear_max_rows(core, code) for core in formats)


@lru_cache(maxsize=4096)
def _workspace_bytes(formats: tuple[_core.Format, ...], m: int, code: int, device: int) -> int:
    with torch.cuda.device(device):
        return _core.cuda_linear_workspace_bytes(formats, m, code)


def _prepared_bias(bias: Tensor, n: int, x: Tensor) -> Tensor:
    check("bias", bias, (n,), DTYPE_CODES, x)
    return _aligned(bias if bias.dtype == x.dtype else bias.to(x.dtype))


def _rotate(x: Tensor, vector: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
    """T (vector * x) of each row, rounded once to ``dtype``."""
    out = torch.empty_like(x, dtype=dtype)
    _launch(
        x.device, _core.cuda_rotate, address(x), code_of(x.dtype), *x.shape, block, address(vector), address(out),
        code_of(dtype),
    )  # fmt: skip
    return out


def _decoded(core: _core.Format, tiled: Tensor, n: int, k: int, dtype: torch.dtype) -> Any:
    """Yields (first row, scale * point [rows, k]) piece by piece, all in one buffer."""
    piece_rows = max(1, _CHUNK_BYTES // (k * dtype.itemsize * _TILE_ROWS)) * _TILE_ROWS
    buffer = torch.empty(min(n, piece_rows), k, dtype=dtype, device=tiled.device)
    for first in range(0, n, piece_rows):
        piece = buffer[: n - first]
        _launch(
            tiled.device, _core.cuda_dequantize_rotated_tiled, core, address(tiled), first, len(piece), address(piece),
            code_of(dtype),
        )  # fmt: skip
        yield first, piece


def _matmul_rotated(rotated: Tensor, core: _core.Format, tiled: Tensor, bias: Tensor | None, n: int) -> Tensor:
    y = rotated.new_empty(rotated.shape[0], n)
    for first, piece in _decoded(core, tiled, n, rotated.shape[1], rotated.dtype):
        columns = slice(first, first + len(piece))
        if bias is None:
            torch.mm(rotated, piece.T, out=y[:, columns])
        else:
            torch.addmm(bias[columns], rotated, piece.T, out=y[:, columns])
    return y
