"""The torch operators of higgs: declarations, shapes, gradients.

Declared with ``torch.library.Library.define`` / ``impl`` on data pointers: no link to libtorch, so one binary serves
every torch version. ``_cpu`` and ``_cuda`` implement them and check what only torch knows (device, dtype, contiguity);
C++ checks values.

    linear        stored layout; on CUDA it is repacked in every call
    linear_tiled  CUDA only: layers that share x, in the layout the kernels read
    dequantize    stored layout -> W^
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _core, _cpu, _cuda
from ._formats import DTYPE_CODES, LayerFormat, check, check_column_scale, layer_format
from .errors import UnsupportedError

__all__ = ["LayerFormat", "dequantize", "layer_format", "linear", "linear_tiled", "quantize"]

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


def direct(x: Tensor) -> bool:
    """Whether the function behind an operator may be called, if there is no gradient to keep. The dispatcher takes
    longer than a kernel for one token, and without tracing, a dispatch mode or a transform it has nothing to do."""
    return not (
        type(x) is not Tensor
        or x.device.type not in _DEVICES
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _differentiable(x: Tensor, biases: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(b is not None and b.requires_grad for b in biases))


class _Linear(torch.autograd.Function):
    """dx = dy @ W^; the packed tensors are constants. ``register_autograd`` would take 50 us longer for each call."""

    @staticmethod
    def forward(ctx, x, indices, scales, column_scale, bias, *fmt):
        ctx.format, ctx.x_dtype = fmt, x.dtype
        ctx.save_for_backward(indices, scales, column_scale)
        return _below_autograd("linear", x, indices, scales, column_scale, bias, *fmt)

    @staticmethod
    def backward(ctx, grad):
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize(*ctx.saved_tensors, *ctx.format, ctx.x_dtype)
        return grad_x, None, None, None, _bias_gradient(grad) if ctx.needs_input_grad[4] else None, *[None] * 4


class _LinearTiled(torch.autograd.Function):
    """The same for :func:`linear_tiled`, whose lists autograd does not look into: biases come one by one, last."""

    @staticmethod
    def forward(ctx, x, tiled, input_vector, has_bias, grids, rows, groups, block, *biases):
        ctx.has_bias, ctx.grids, ctx.groups, ctx.block = has_bias, grids, groups, block
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tiled, input_vector)
        call = (x, tiled, input_vector, list(biases), has_bias, grids, rows, groups, block)
        return tuple(_below_autograd("linear_tiled", *call))

    @staticmethod
    def backward(ctx, *grads):
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
            for grad, needed in zip(of_biases, ctx.needs_input_grad[8:], strict=True)
        ]
        return grad_x, *[None] * 7, *biases


def _below_autograd(name: str, x: Tensor, *arguments: Any) -> Any:
    if direct(x):
        device = _cuda if name == "linear_tiled" else _DEVICES[x.device.type]
        return getattr(device, name)(x, *arguments)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise UnsupportedError("forward-mode derivatives of a quantized layer are not supported; use reverse mode")
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.higgs, name)(x, *arguments)


def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad


def _linear_autograd(x, indices, scales, column_scale, bias, *fmt):
    if _differentiable(x, [bias]):
        return _Linear.apply(x, indices, scales, column_scale, bias, *fmt)
    return _below_autograd("linear", x, indices, scales, column_scale, bias, *fmt)


def _linear_tiled_autograd(x, tiled, input_vector, biases, *rest):
    if _differentiable(x, biases):
        return list(_LinearTiled.apply(x, tiled, input_vector, *rest, *biases))
    return _below_autograd("linear_tiled", x, tiled, input_vector, biases, *rest)


_library.impl("linear", _linear_autograd, "Autograd")
_library.impl("linear_tiled", _linear_tiled_autograd, "Autograd")


def linear(x: Tensor, *arguments: Any) -> Tensor:
    """``torch.ops.higgs.linear`` without its dispatcher where that has nothing to do."""
    return (_linear_autograd if direct(x) else torch.ops.higgs.linear)(x, *arguments)


def linear_tiled(x: Tensor, *arguments: Any) -> list[Tensor]:
    """``torch.ops.higgs.linear_tiled`` without its dispatcher where that has nothing to do."""
    return (_linear_tiled_autograd if direct(x) else torch.ops.higgs.linear_tiled)(x, *arguments)


dequantize = torch.ops.higgs.dequantize
