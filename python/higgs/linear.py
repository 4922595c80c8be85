"""``HiggsLinear``: a quantized ``torch.nn.Linear``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _ops
from ._ops import LayerFormat


class HiggsLinear(nn.Module):
    """y = x @ W^T + bias with W on a grid, in the stored layout (FORMAT.md).

    Tensors: ``indices`` uint8 [out_features, row_bytes], ``scales`` float16 [out_features, groups], ``column_scale``
    float16 [in_features] or None, ``bias`` [out_features] or None. All but the bias are constants. x may be float32,
    float16 or bfloat16 with any leading shape; y has its dtype. Gradients flow to x and the bias.
    """

    indices: nn.Parameter
    scales: nn.Parameter
    column_scale: nn.Parameter | None
    bias: nn.Parameter | None

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

        def constant(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)

        # Parameters, not buffers: tensor parallelism in transformers shards only parameters.
        self.indices = constant(fmt.n, fmt.row_bytes, dtype=torch.uint8)
        self.scales = constant(fmt.n, fmt.row_groups, dtype=torch.float16)
        self.register_parameter("column_scale", constant(fmt.k, dtype=torch.float16) if column_scale else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(fmt.n, dtype=dtype, device=device)) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, fmt: LayerFormat, column_scale: Tensor | None = None
    ) -> tuple[HiggsLinear, float]:
        """Quantizes ``linear``; returns the new module and its t2. The bias is shared, not copied."""
        indices, scales, t2 = _ops.quantize(linear.weight, fmt, column_scale)
        module = cls(fmt, column_scale=column_scale is not None, device="meta")
        module.indices = nn.Parameter(indices, requires_grad=False)
        module.scales = nn.Parameter(scales, requires_grad=False)
        if column_scale is not None:
            # A copy: layers that share a column scale are saved each with its own.
            module.column_scale = nn.Parameter(column_scale.clone(), requires_grad=False)
        module.bias = linear.bias
        module.train(linear.training)
        return module, t2

    def _arguments(self) -> tuple[str, int, int, int]:
        return self.format.grid, self.format.block, self.format.group, self.format.seed

    def forward(self, x: Tensor) -> Tensor:
        return _ops.linear(x, self.indices, self.scales, self.column_scale, self.bias, *self._arguments())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W^ [out_features, in_features]."""
        return _ops.dequantize(self.indices, self.scales, self.column_scale, *self._arguments(), dtype)

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
        # model.half(), .float() or .to(bfloat16) moves the packed tensors but never converts them: their dtypes belong
        # to the format.
        packed = {name: getattr(self, name) for name in ("scales", "column_scale")}
        kept = {name: tensor.data for name, tensor in packed.items() if tensor is not None}
        result = super()._apply(fn, recurse)
        for name, data in kept.items():
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != data.dtype:
                tensor.data = data.to(tensor.device)
        return result

    def extra_repr(self) -> str:
        f = self.format
        return (
            f"in_features={f.k}, out_features={f.n}, bias={self.bias is not None}, grid={f.grid}, block={f.block}, "
            f"group={f.group}, column_scale={self.column_scale is not None}"
        )
