"""``quantization_config`` of a checkpoint (FORMAT.md, "In a checkpoint")."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import _core
from ._ops import LayerFormat, layer_format
from .errors import FormatError

QUANT_METHOD = "higgs_quant"
# In the place of one weight, so that programs that know nothing of higgs find a wrong shape there and say so, rather
# than take all quantized weights for missing ones and draw them at random.
GUARD = b"quantized by higgs: install it and import higgs"


def guarded(layers: Iterable[str]) -> str | None:
    """The tensor that the guard of a checkpoint is called, given its quantized Linear layers (no experts, embedding or
    output head); None if there are none."""
    first = min(layers, default=None)
    return None if first is None else f"{first}.weight"


def guard_tensor() -> torch.Tensor:
    return torch.frombuffer(bytearray(GUARD), dtype=torch.uint8)


@dataclass(frozen=True)
class LayerConfig:
    """Grid, block, scale group, key of the signs and presence of a column scale of one layer; ``experts``: how many
    matrices of a mixture lie one below the other in it."""

    grid: str
    block: int
    group: int
    seed: int
    column_scale: bool = False
    experts: int | None = None

    def __post_init__(self) -> None:
        if self.experts is not None and (type(self.experts) is not int or self.experts < 1):
            raise ValueError(f"experts is {self.experts!r}, expected a positive integer")
        if type(self.column_scale) is not bool:
            raise ValueError(f"column_scale is {self.column_scale!r}, expected true or false")

    def format(self, name: str, n: int, k: int) -> LayerFormat:
        try:
            return layer_format(n, k, self.grid, block=self.block, group=self.group, seed=self.seed)
        except (TypeError, ValueError) as e:
            raise FormatError(f"quantization_config of layer {name} [{n}, {k}]: {e}") from e

    @classmethod
    def of(cls, fmt: LayerFormat, *, column_scale: bool, experts: int | None = None) -> LayerConfig:
        return cls(fmt.grid, fmt.block, fmt.group, fmt.seed, column_scale, experts)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "experts" or value is not None}


@dataclass
class QuantizationConfig:
    """Everything a checkpoint says about its quantized layers."""

    layers: dict[str, LayerConfig] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format_version": _core.format_version,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantizationConfig:
        """Raises FormatError for another quant_method, an unknown format_version or a malformed layer entry."""
        method, version = data.get("quant_method"), data.get("format_version")
        if method != QUANT_METHOD:
            raise FormatError(f"quant_method is {method!r}, expected {QUANT_METHOD!r}")
        if version != _core.format_version:
            raise FormatError(
                f"format_version of the checkpoint is {version!r}, this version of higgs reads {_core.format_version}"
            )
        entries, layers = data.get("layers", {}), {}
        if not isinstance(entries, dict):
            raise FormatError(
                f"layers of the quantization_config is {entries!r}, expected an entry for each layer name"
            )
        for name, entry in entries.items():
            try:
                layers[name] = LayerConfig(**entry)
                _core.find_grid(layers[name].grid)
            except TypeError:
                expected = "grid, block, group, seed and, optionally, column_scale and experts"
                raise FormatError(f"quantization_config of layer {name} is {entry!r}, expected {expected}") from None
            except ValueError as e:
                raise FormatError(f"quantization_config of layer {name}: {e}") from e
        return cls(layers)
