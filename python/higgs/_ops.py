"""The torch operators of higgs: declarations, shapes, gradients.

Declared with ``torch.library.Library.define`` / ``impl`` on data pointers: no link to libtorch, so one binary serves
every torch version. ``_cpu`` and ``_cuda`` implement them and check what only torch knows (device, dtype, contiguity);
C++ checks values.

    linear        stored layout; on CUDA it is repacked in every call
    linear_tiled  CUDA only: layers that share x, in the layout the kernels read
    dequantize    stored layout -> W^
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _core, _cpu, _cuda
from ._formats import DTYPE_CODES, LayerFormat, check, check_column_scale, layer_format
from .errors import UnsupportedError

__all__ = ["LayerFormat", "dequantize", "direct", "layer_format", "linear", "linear_tiled", "quantize"]

_DEVICES = {"cpu": _cpu, "cuda": _cuda}


def quantize(weight: Tensor, fmt: LayerFormat, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Quantizes ``weight`` [n, k] (float32, float16 or bfloat16, finite; arXiv 2411.17525, algorithm 1) on its device.

    Returns ``indices`` uint8 [n, row_bytes], ``scales`` float16 [n, row_groups] (the same bytes on every device) and
    t2, the relative squared error (in the column-scaled space if there is a ``column_scale``: float16 [k], anywhere).
    """
    device = _DEVICES.get(weight.device.type)
    if device is None:
        raise UnsupportedError(f"weight is on {weight.device}; use the CPU or a CUDA device")
    check("weight", weight, (fmt.n, fmt.k), DTYPE_CODES, weight)
    if column_scale is not None:
        column_scale = column_scale.to(weight.device)
        check_column_scale(column_scale, fmt.k, weight)
    return device.quantize(weight.detach().contiguous(), fmt, column_scale)


_library = torch.library.Library("higgs", "DEF")
_library.define(
    "linear(Tensor x, Tensor indices, Tensor scales, Tensor? column_scale, Tensor? bias,"
    " str grid, int block, int group, int seed) -> Tensor"
)
_library.define(
    "linear_tiled(Tensor x, Tensor[] tiled, Tensor input_vector, Tensor[] biases, bool[] has_bias,"
    " str[] grids, int[] rows, int[] groups, int block) -> Tensor[]"
)
_library.define(
    "linear_tiled_grad(Tensor[] grads, Tensor[] tiled, Tensor input_vector,"
    " str[] grids, int[] groups, int block) -> Tensor"
)
_library.define(
    "dequantize(Tensor indices, Tensor scales, Tensor? column_scale,"
    " str grid, int block, int group, int seed, ScalarType dtype) -> Tensor"
)
for _name, _device in (("CPU", _cpu), ("CUDA", _cuda)):
    _library.impl("linear", _device.linear, _name)
    _library.impl("dequantize", _device.dequantize, _name)
_library.impl("linear_tiled", _cuda.linear_tiled, "CUDA")
_library.impl("linear_tiled_grad", _cuda.linear_tiled_grad, "CUDA")


@torch.library.register_fake("higgs::linear", lib=_library)
def _linear_fake(x, indices, scales, column_scale, bias, grid, block, group, seed):
    return x.new_empty(*x.shape[:-1], indices.shape[0])


@torch.library.register_fake("higgs::linear_tiled", lib=_library)
def _linear_tiled_fake(x, tiled, input_vector, biases, has_bias, grids, rows, groups, block):
    return [x.new_empty(*x.shape[:-1], n) for n in rows]


@torch.library.register_fake("higgs::linear_tiled_grad", lib=_library)
def _linear_tiled_grad_fake(grads, tiled, input_vector, grids, groups, block):
    return grads[0].new_empty(*grads[0].shape[:-1], input_vector.shape[0])


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
    return grad_x, None, None, None, _bias_gradient(grad) if ctx.has_bias else None, None, None, None, None


def _linear_tiled_setup(ctx, inputs, output) -> None:
    _, tiled, input_vector, _, ctx.has_bias, ctx.grids, _, ctx.groups, ctx.block = inputs
    ctx.save_for_backward(*tiled, input_vector)


def _linear_tiled_backward(ctx, grads):
    *tiled, input_vector = ctx.saved_tensors
    used = [i for i, grad in enumerate(grads) if grad is not None]
    grad_x = None
    if ctx.needs_input_grad[0] and used:
        grad_x = torch.ops.higgs.linear_tiled_grad(
            [grads[i] for i in used], [tiled[i] for i in used], input_vector,
            [ctx.grids[i] for i in used], [ctx.groups[i] for i in used], ctx.block,
        )  # fmt: skip
    of_biases = [grad for grad, has_bias in zip(grads, ctx.has_bias, strict=True) if has_bias]
    biases = [
        _bias_gradient(grad) if needed and grad is not None else None
        for grad, needed in zip(of_biases, ctx.needs_input_grad[3], strict=True)
    ]
    return grad_x, [None] * len(tiled), None, biases, None, None, None, None, None


def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad


torch.library.register_autograd("higgs::linear", _linear_backward, setup_context=_linear_setup, lib=_library)
torch.library.register_autograd(
    "higgs::linear_tiled", _linear_tiled_backward, setup_context=_linear_tiled_setup, lib=_library
)


def direct(x: Tensor) -> bool:
    """Whether an operator may be called as the function it is. The dispatcher takes longer than a kernel for one token,
    and without gradients, tracing or a dispatch mode it has nothing to do."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack()
    )


linear = torch.ops.higgs.linear
linear_tiled = torch.ops.higgs.linear_tiled
dequantize = torch.ops.higgs.dequantize
