"""``HiggsLinear``: a quantized ``torch.nn.Linear``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from . import _core, _cuda, _ops
from ._formats import LayerFormat
from .errors import UnsupportedError

# An x and its y of layers that were computed together (shared_inputs). No attribute of the layer: compiled code would
# write it anew in every call.
pending: dict[nn.Module, tuple[Tensor, Tensor]] = {}


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
    _hf_quantized_needs_local_tp = True  # transformers: tensor parallelism hands on plain tensors

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
        self.is_conv1d = False  # whether an unquantized model has a Conv1D in its place

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
        self.sharding: tuple[Any, Any] | None = None  # of a shard of tensor parallelism: mesh, placement
        self.input_key: tuple | None = None  # of a tiled layer: equal for layers that rotate x alike

    @property
    def format(self) -> LayerFormat:
        return self._format

    @format.setter
    def format(self, fmt: LayerFormat) -> None:
        """Compiled code compares one tuple in every call, rather than the fields of an object."""
        self._format, self._arguments = fmt, (fmt.grid, fmt.block, fmt.group, fmt.seed)
        self._launch = (fmt.grid, fmt.n, fmt.group, fmt.block)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, fmt: LayerFormat, column_scale: Tensor | None = None
    ) -> tuple[HiggsLinear, float]:
        """Quantizes ``linear`` (an nn.Linear or a Conv1D of transformers) on its device; returns the new module and its
        t2. The bias is shared, not copied."""
        original, linear = linear, as_linear(linear)
        indices, scales, t2 = _ops.quantize(linear.weight, fmt, column_scale)
        module = cls(fmt, column_scale=column_scale is not None, device="meta")
        module.indices, module.scales = constant(indices), constant(scales)
        if column_scale is not None:
            # A copy: layers that share a column scale are saved each with its own.
            module.column_scale = constant(column_scale.to(indices.device, copy=True))
        module.bias = linear.bias
        module.stand_for(original)
        module.tile_()
        return module, t2

    def stand_for(self, original: nn.Module) -> HiggsLinear:
        """Takes over from ``original`` what is not in tensors; returns the module."""
        self.is_conv1d = is_conv1d(original)
        return self.train(original.training)

    def tile_(self) -> HiggsLinear:
        """Changes to the layout of the CUDA kernels, if the module is on a CUDA device; returns the module.

        Where higgs was built without CUDA, modules stay as they are.
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

    def forward(self, x: Tensor) -> Tensor:
        if self in pending and pending[self][0] is x:
            return pending[self][1]
        x = _autocast(x)
        if self.tiled is not None:
            return _linear_tiled(x, [self])[0]
        return _ops.linear(x, self.indices, self.scales, self.column_scale, self.bias, *self._arguments)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W^ [out_features, in_features]. Raises UnsupportedError for a shard of tensor parallelism."""
        self.require_whole()
        return _ops.dequantize(*self.stored(), self.column_scale, *self._arguments, dtype)

    def require_whole(self) -> None:
        """Raises UnsupportedError for a shard of tensor parallelism."""
        if self.sharding is not None:
            raise UnsupportedError("a shard of tensor parallelism cannot be dequantized; load the model without")

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """An ordinary Linear (or Conv1D, if that is what was quantized) with the dequantized weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return (_as_conv1d(linear) if self.is_conv1d else linear).train(self.training)

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
        if self.sharding is not None:
            from .integrations.tensor_parallel import gathered

            for name in ("indices", "scales", "column_scale")[: 2 + self.sharding[1].dim]:
                if f"{prefix}{name}" in destination:
                    destination[f"{prefix}{name}"] = gathered(destination[f"{prefix}{name}"], self.sharding)

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
    return _linear_tiled(_autocast(x), layers) if can_share(layers) else [layer(x) for layer in layers]


def can_share(layers: Sequence[nn.Module]) -> TypeGuard[Sequence[HiggsLinear]]:
    """Whether :func:`linear_shared` computes ``layers`` in one call."""
    key = getattr(layers[0], "input_key", None)
    return key is not None and all(isinstance(layer, HiggsLinear) and layer.input_key == key for layer in layers)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D (GPT-2): a Linear whose weight is [in_features, out_features]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def as_linear(module: nn.Module) -> nn.Linear:
    """``module``; of a Conv1D or an Embedding, a Linear that shares its tensors."""
    if type(module) is nn.Embedding:
        linear = nn.Linear(module.embedding_dim, module.num_embeddings, bias=False, device="meta")
        linear.weight = module.weight
        return linear
    if not is_conv1d(module):
        return cast(nn.Linear, module)
    weight, bias = cast(Tensor, module.weight), cast(nn.Parameter, module.bias)
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight, linear.bias = constant(weight.detach().T), bias
    return linear.train(module.training)


def _as_conv1d(linear: nn.Linear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(0, 0)
    conv.nx, conv.nf = linear.in_features, linear.out_features
    conv.weight, conv.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias
    return conv


def _linear_tiled(x: Tensor, layers: Sequence[HiggsLinear]) -> list[Tensor]:
    biases = [layer.bias for layer in layers]
    grids, rows, groups, blocks = zip(*[layer._launch for layer in layers], strict=True)
    return _ops.linear_tiled(
        x, [layer.tiled for layer in layers], layers[0].input_vector,
        [bias for bias in biases if bias is not None], [bias is not None for bias in biases],
        list(grids), list(rows), list(groups), blocks[0],
    )  # fmt: skip


def digest(tensor: Tensor | None) -> str | None:
    return None if tensor is None else hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()


def _autocast(x: Tensor) -> Tensor:
    """Under torch.autocast x gets the dtype that nn.Linear would give it."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # which raises for "meta"
        return x
    return x.to(torch.get_autocast_dtype(kind))


def constant(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)
