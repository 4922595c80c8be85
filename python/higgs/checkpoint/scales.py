"""Column scales of a streamed checkpoint: layers that read the same input share one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _ops
from .._formats import LayerFormat
from ..energies import column_scale, pooled_energy, weight_energy
from .files import Checkpoint
from .plan import LayerPlan, Plan

if TYPE_CHECKING:
    from ..energies import Energies


class ColumnScales:
    """Computes the column scale of a layer when it is asked for, from its input energy and the weight energies of all
    layers that share the input, which it reads from their shards one at a time."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, energies: Energies | None, exponent: float) -> None:
        """Raises ValueError if the energies belong to another model."""
        self._checkpoint, self._exponent = checkpoint, exponent
        self._inputs = energies.energies if energies is not None else {}
        self._sharing: dict[str, list[LayerPlan]] = {}
        self._weight_energies: dict[str, Tensor] = {}
        self._scales: dict[tuple[str, ...], Tensor] = {}
        by_module = {layer.module: layer for layer in plan.layers}
        inputs = energies.inputs_of(by_module) if energies is not None else []
        if energies is not None and not inputs:
            raise ValueError("the input energies know none of the layers: they belong to another model")
        for names in inputs:
            sharing = [by_module[name] for name in names]
            for layer in sharing:
                self._check(layer)
                self._sharing[layer.name] = sharing

    def _check(self, layer: LayerPlan) -> None:
        energy = self._inputs[layer.module]
        if tuple(energy.shape) != (layer.fmt.k,):
            raise ValueError(
                f"the input energies of {layer.module} have shape {list(energy.shape)}, expected [{layer.fmt.k}]: "
                "they belong to another model"
            )
        if not torch.isfinite(energy).all():
            self._explain(layer.module)

    def _explain(self, module: str) -> None:
        """Input energies that are NaN come from a weight that is, maybe in another layer: finds and names it."""
        for entry in self._checkpoint.tensors.values():
            if entry.dtype in ("F32", "F16", "BF16"):
                tensor = self._checkpoint.read(entry.name)
                bad = (~torch.isfinite(tensor)).nonzero()
                if len(bad):
                    at = bad[0].tolist()
                    value = float(tensor[tuple(at)])
                    raise ValueError(
                        f"tensor {entry.name}: weight {at} is {value}; only finite weights can be quantized"
                    )
        raise ValueError(f"the input energies of {module} contain NaN or inf")

    @property
    def layers(self) -> set[str]:
        """Names of the layers that get a column scale."""
        return set(self._sharing)

    def of(self, layer: LayerPlan) -> Tensor | None:
        """The column scale of ``layer``, float16 [k]. Raises ValueError naming a tensor that holds NaN or inf."""
        sharing = self._sharing.get(layer.name)
        if sharing is None:
            return None
        key = tuple(member.name for member in sharing)
        if key not in self._scales:
            energies = [self._weight_energy(member) for member in sharing]
            self._scales[key] = self._scale(layer, pooled_energy(self._inputs[layer.module], energies))
        return self._scales[key]

    def pooling_cost(self, layer: LayerPlan) -> float | None:
        """By how much sharing the scale raises the expected output error of ``layer``, as a fraction of what a scale of
        its own would give; None if it shares with none."""
        shared = self.of(layer)
        if shared is None or len(self._sharing[layer.name]) == 1:
            return None
        own = self._scale(layer, self._weight_energy(layer))
        expected = self._expected_error(layer, own)
        return self._expected_error(layer, shared) / expected - 1 if expected else 0.0

    def _scale(self, layer: LayerPlan, weight_energy: Tensor) -> Tensor:
        return column_scale(self._inputs[layer.module], weight_energy, self._exponent, layer.fmt.block)

    def _weight_energy(self, layer: LayerPlan) -> Tensor:
        if layer.name not in self._weight_energies:
            energies = []
            for source, weight in read_rows(self._checkpoint, layer):
                energies.append(weight_energy(weight))
                if not torch.isfinite(energies[-1]).all():
                    quantize_named(weight, source, layer.fmt, None)  # its message gives row and column
                    raise ValueError(f"{source}: the weights are too large, their squares overflow")
            self._weight_energies[layer.name] = torch.stack(energies).sum(0)
        return self._weight_energies[layer.name]

    def _expected_error(self, layer: LayerPlan, scale: Tensor) -> float:
        """Sum over the Hadamard blocks of (sum a_j / s_j^2)(sum b_j s_j^2): proportional to the output error."""
        s2 = scale.double().square()
        a = (self._inputs[layer.module].double() / s2).reshape(-1, layer.fmt.block).sum(1)
        b = (self._weight_energy(layer).double() * s2).reshape(-1, layer.fmt.block).sum(1)
        return float((a * b).sum())


def read_rows(checkpoint: Checkpoint, layer: LayerPlan) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layer, each with its rows [n, k], read one at a time."""
    for source in layer.sources:
        weight = checkpoint.read(source)
        yield source, weight.T if layer.transposed else weight.flatten(0, -2)


def quantize_named(weight: Tensor, source: str, fmt: LayerFormat, scale: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """``_ops.quantize`` of some rows of a layer; errors name the tensor."""
    try:
        return _ops.quantize(weight, fmt.with_rows(len(weight)), scale)
    except ValueError as e:
        raise ValueError(f"tensor {source}: {e}") from e
