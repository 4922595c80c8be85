"""``HiggsLinear``: a quantized ``torch.nn.Linear``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _core, _cuda, _ops
from ._formats import LayerFormat


class HiggsLinear(nn.Module):
    """y = x @ W^T + bias with W on a grid. x may be float32, float16 or bfloat16 with any leading shape; y has its
    dtype. Gradients flow to x and the bias.

    In the stored layout (FORMAT.md) the module has ``indices`` uint8 [out_features, row_bytes], ``scales`` float16
    [out_features, groups], ``column_scale`` float16 [in_features] or None, ``bias`` [out_features] or None. All but the
    bias are constants.

    On a CUDA device ``indices`` and ``scales`` are None, and ``tiled`` (uint8, a permutation of their bytes) holds what
    the kernels read, so that the weights are in memory once. Moving the module, loading into it, copying and pickling
    go through the stored layout, to which the way back is exact; ``state_dict`` and files hold nothing else. A module
    whose parameters got to a CUDA device by other means stays in the stored layout, and is slow, until :meth:`tile_`.
    """

    indices: nn.Parameter | None
    scales: nn.Parameter | None
    column_scale: nn.Parameter | None
    bias: nn.Parameter | None
    tiled: nn.Parameter | None
    input_vector: Tensor | None

    def __init__(
        self,
        fmt: LayerFormat,
        *,
        bias: bool = False,
        column_scale: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = fmt.k, fmt.n, fmt

        def empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return constant(torch.empty(*shape, dtype=dtype, device=device))

        # Parameters, not buffers: tensor parallelism in transformers shards only parameters, and data parallelism sends
        # buffers around in every step.
        self.indices = empty(fmt.n, fmt.row_bytes, dtype=torch.uint8)
        self.scales = empty(fmt.n, fmt.row_groups, dtype=torch.float16)
        self.register_parameter("column_scale", empty(fmt.k, dtype=torch.float16) if column_scale else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(fmt.n, dtype=dtype, device=device)) if bias else None)
        self.register_parameter("tiled", None)
        self.register_buffer("input_vector", None, persistent=False)
        self.input_key: tuple | None = None  # of a tiled layer: equal for layers that rotate x alike

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, fmt: LayerFormat, column_scale: Tensor | None = None
    ) -> tuple[HiggsLinear, float]:
        """Quantizes ``linear`` on its device; returns the new module and its t2. The bias is shared, not copied."""
        indices, scales, t2 = _ops.quantize(linear.weight, fmt, column_scale)
        module = cls(fmt, column_scale=column_scale is not None, device="meta")
        module.indices, module.scales = constant(indices), constant(scales)
        if column_scale is not None:
            # A copy: layers that share a column scale are saved each with its own.
            module.column_scale = constant(column_scale.to(indices.device, copy=True))
        module.bias = linear.bias
        module.train(linear.training)
        module.tile_()
        return module, t2

    def tile_(self) -> HiggsLinear:
        """Changes to the layout of the CUDA kernels, if the module is on a CUDA device; returns the module.

        A shard of tensor parallelism stays as it is, as do all modules where higgs was built without CUDA.
        """
        f = self.format
        if not _core.with_cuda or self.indices is None or self.scales is None or not self.indices.is_cuda:
            return self
        if tuple(self.indices.shape) == (f.n, f.row_bytes):
            self.tiled = constant(_cuda.repack(self.indices, self.scales, f))
            self.input_vector = _cuda.input_vector(self.column_scale, f, self.indices.device)
            self.input_key = (f.k, f.block, f.seed, digest(self.column_scale))
            self.indices = self.scales = None
        return self

    def untile_(self) -> HiggsLinear:
        """Changes back to the stored layout; returns the module."""
        if self.tiled is not None:
            self.indices, self.scales = map(constant, self.stored())
            self.tiled = self.input_vector = self.input_key = None
        return self

    def stored(self) -> tuple[Tensor, Tensor]:
        """``indices`` and ``scales`` of the stored layout, on the module's device."""
        if self.tiled is not None:
            return _cuda.unrepack(self.tiled, self.format)
        assert self.indices is not None and self.scales is not None
        return self.indices, self.scales

    def _arguments(self) -> tuple[str, int, int, int]:
        return self.format.grid, self.format.block, self.format.group, self.format.seed

    def forward(self, x: Tensor) -> Tensor:
        x = _autocast(x)
        if self.tiled is not None:
            return _linear_tiled(x, [self])[0]
        return _ops.linear(x, self.indices, self.scales, self.column_scale, self.bias, *self._arguments())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W^ [out_features, in_features]."""
        return _ops.dequantize(*self.stored(), self.column_scale, *self._arguments(), dtype)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ordinary Linear with the dequantized weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return linear.train(self.training)

    def bits(self) -> float:
        """Effective bits per weight, scales counted."""
        return self.format.bits(self.column_scale is not None)

    def _apply(self, fn, recurse: bool = True):
        if self.tiled is not None and fn(self.tiled.new_empty(0)).device != self.tiled.device:
            self.untile_()
        # model.half(), .float() or .to(bfloat16) moves the packed tensors but never converts them: their dtypes belong
        # to the format.
        packed = {name: getattr(self, name) for name in ("scales", "column_scale", "input_vector")}
        kept = {name: tensor.data for name, tensor in packed.items() if tensor is not None}
        result = super()._apply(fn, recurse)
        for name, data in kept.items():
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != data.dtype:
                tensor.data = data.to(tensor.device)
        self.tile_()
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if destination.pop(f"{prefix}tiled", None) is not None:
            destination[f"{prefix}indices"], destination[f"{prefix}scales"] = self.stored()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.untile_()
        super()._load_from_state_dict(*args, **kwargs)
        self.tile_()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self.tiled is not None:  # through a stored twin that shares everything else
            twin = type(self).__new__(type(self))
            twin.__dict__.update(state, _parameters=dict(self._parameters), _buffers=dict(self._buffers))
            state = twin.untile_().__dict__
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.tile_()

    def extra_repr(self) -> str:
        f = self.format
        return (
            f"in_features={f.k}, out_features={f.n}, bias={self.bias is not None}, grid={f.grid}, block={f.block}, "
            f"group={f.group}, column_scale={self.column_scale is not None}"
        )


def linear_shared(x: Tensor, layers: Sequence[HiggsLinear]) -> list[Tensor]:
    """``[layer(x) for layer in layers]`` for layers that read the same input (q/k/v, gate/up), each on any grid.

    On a CUDA device, layers with the same in_features, block, seed and column scale are one call, in which neighbours
    whose grids share a decoder share a launch and the rotation of x; other layers, and the CPU, are called one by one.
    """
    x = _autocast(x)
    key = layers[0].input_key
    if key is None or any(layer.input_key != key for layer in layers):
        return [layer(x) for layer in layers]
    return _linear_tiled(x, layers)


def _linear_tiled(x: Tensor, layers: Sequence[HiggsLinear]) -> list[Tensor]:
    formats, biases = [layer.format for layer in layers], [layer.bias for layer in layers]
    call: Any = _cuda.linear_tiled if _ops.direct(x) else _ops.linear_tiled
    return call(
        x, [layer.tiled for layer in layers], layers[0].input_vector,
        [bias for bias in biases if bias is not None], [bias is not None for bias in biases],
        [f.grid for f in formats], [f.n for f in formats], [f.group for f in formats], formats[0].block,
    )  # fmt: skip


def digest(tensor: Tensor | None) -> str | None:
    return None if tensor is None else hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()


def _autocast(x: Tensor) -> Tensor:
    """Under torch.autocast x gets the dtype that nn.Linear would give it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def constant(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)
