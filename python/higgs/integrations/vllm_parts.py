"""Layers of a checkpoint, or a rank's share of them, as vLLM reads their tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._ops import LayerFormat, quantize
from ..errors import FormatError
from ..linear import HiggsLinear, constant
from .transformers import check_scales


@dataclass
class Part:
    """What a rank has of one layer of the checkpoint: the rows ``rows`` of ``whole``, an index, and the columns from
    ``first_column``."""

    name: str
    whole: LayerFormat
    rows: slice | Tensor
    first_column: int
    module: HiggsLinear

    def load(self, kind: str, tensor: Tensor, device: torch.device) -> None:
        """Takes this part's share of the checkpoint's tensor ``NAME.kind``; a float ``weight`` is quantized."""
        whole, own = self.whole, self.module.format
        found = f"{tensor.dtype} {list(tensor.shape)}"
        expected = {
            "indices": f"{torch.uint8} {[whole.n, whole.row_bytes]}",
            "scales": f"{torch.float16} {[whole.n, whole.row_groups]}",
            "column_scale": "none" if self.module.column_scale is None else f"{torch.float16} {[whole.k]}",
            "weight": f"{tensor.dtype} {[whole.n, whole.k]}",
        }
        if found != expected[kind]:
            raise FormatError(f"tensor {self.name}.{kind} is {found}, expected {expected[kind]}")
        first = self.first_column
        if kind == "scales":
            columns = slice(first // whole.group, first // whole.group + own.row_groups)
        elif kind == "indices":
            columns = slice(first * whole.row_bytes // whole.k, (first + own.k) * whole.row_bytes // whole.k)
        else:
            columns = slice(first, first + own.k)
        tensor = tensor[..., columns]
        if kind != "column_scale":
            tensor = tensor[self.rows]
            tensor = nn.functional.pad(tensor, (0, 0, 0, own.n - len(tensor)))  # of a vocabulary; rows of zeros
        tensor = tensor.to(device, copy=True, memory_format=torch.contiguous_format)
        if kind == "weight":
            self.quantize(tensor)
        else:
            setattr(self.module, kind, constant(tensor))

    def quantize(self, weight: Tensor) -> None:
        indices, scales = quantized(self.name, weight, self.module.format)
        self.module.indices, self.module.scales = constant(indices), constant(scales)

    def check(self, quantizing: bool) -> None:
        """Raises FormatError if a tensor has not come, or its values are none that a checkpoint may hold."""
        missing = next((kind for kind, tensor in self.module.named_parameters() if tensor.is_meta), None)
        if missing is not None:
            raise FormatError(f"the checkpoint has no tensor {self.name}.{'weight' if quantizing else missing}")
        check_scales(self.name, self.module)


def quantized(name: str, weight: Tensor, fmt: LayerFormat) -> tuple[Tensor, Tensor]:
    """Indices and scales of ``weight``. Raises ValueError that names the layer."""
    try:
        indices, scales, _t2 = quantize(weight, fmt)
    except ValueError as e:
        raise ValueError(f"layer {name}: {e}") from e
    return indices, scales
