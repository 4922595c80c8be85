"""Experts of a mixture: modules that transformers (5.x) keeps as two 3-D parameters, ``gate_up_proj`` [experts, 2 i, h]
and ``down_proj`` [experts, h, i], and the quantized module in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import _grouped, _ops
from ._formats import LayerFormat
from .linear import HiggsLinear, _autocast, constant

# Names of the projections: parameter of the original module -> quantized layer. They differ, as transformers takes what
# begins with the name of a parameter for a tensor that it is to split into those of single experts.
PROJECTIONS = {"gate_up_proj": "gate_up", "down_proj": "down"}


class HiggsGrouped(HiggsLinear):
    """One projection of all experts: y[i] = x[i] @ W_e^T for rows of x sorted by expert e.

    A :class:`HiggsLinear` whose out_features are the rows of all experts, one below the other: [experts * n, k].
    """

    def __init__(self, fmt: LayerFormat, experts: int, **options: Any) -> None:
        """Raises ValueError if the rows of ``fmt`` are no multiple of ``experts``."""
        if experts < 1 or fmt.n % experts:
            raise ValueError(f"{experts} experts cannot share {fmt.n} rows of weights")
        super().__init__(fmt, **options)
        self.experts = experts

    @classmethod
    def from_weight(
        cls, weight: Tensor, fmt: LayerFormat, column_scale: Tensor | None = None
    ) -> tuple[HiggsGrouped, float]:
        """Quantizes ``weight`` [experts, n, k] on its device; returns the module and its t2."""
        indices, scales, t2 = _ops.quantize(weight.flatten(0, 1), fmt, column_scale)
        module = cls(fmt, len(weight), column_scale=column_scale is not None, device="meta")
        module.indices, module.scales = constant(indices), constant(scales)
        if column_scale is not None:
            module.column_scale = constant(column_scale.to(indices.device, copy=True))
        module.tile_()
        return module, t2

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """``x`` [t, k] sorted by expert, ``offsets`` int32 [experts]: where the rows of each expert end, the last one
        at t. Returns [t, n]."""
        x, f = _autocast(x), self.format
        if self.tiled is not None:
            differentiable = torch.is_grad_enabled() and x.requires_grad  # then called as an operator
            direct = _ops.direct(x) and not differentiable
            call: Any = _grouped.tiled_linear if direct else _grouped.grouped_linear_tiled
            return call(x, offsets, self.tiled, self.input_vector, f.grid, f.n, f.group, f.block)
        packed = self.indices, self.scales, self.column_scale, f.grid, f.block, f.group, f.seed
        return _grouped.grouped_linear(x, offsets, *packed)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W^ [experts, n, k]."""
        return super().dequantize(dtype).view(self.experts, -1, self.in_features)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        raise TypeError("the experts of a mixture are no Linear layer; use dequantize")

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"


class HiggsExperts(nn.Module):
    """The experts of a mixture with both projections quantized, in place of a module of transformers.

    ``shell`` is that module without its weights; its activation and gating are used as they are.
    """

    def __init__(self, shell: nn.Module, gate_up: HiggsGrouped, down: HiggsGrouped) -> None:
        super().__init__()
        self.shell, self.gate_up, self.down = shell, gate_up, down
        self.train(shell.training)

    @classmethod
    def without_weights(
        cls, experts: Any, formats: Mapping[str, LayerFormat], column_scale: Mapping[str, bool] | None = None
    ) -> HiggsExperts:
        """On the meta device, in place of ``experts``. Formats, and whether there is a column scale, by "gate_up" and
        "down"."""
        scaled, count = column_scale or {}, len(experts.down_proj)
        layers = {
            name: HiggsGrouped(fmt, count, column_scale=scaled.get(name, False), device="meta")
            for name, fmt in formats.items()
        }
        return cls(shell_of(experts), **layers)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` [t, h], and for each token ``top_k_index`` [t, k], the experts that it meets, and
        ``top_k_weights`` [t, k], what their outputs count. Returns [t, h]."""
        top_k, sharding = top_k_index.shape[-1], self.down.sharding
        if sharding is not None:  # in expert parallelism the experts of other ranks have a number that is too large
            others = top_k_index >= self.gate_up.experts
            top_k_index, top_k_weights = top_k_index.masked_fill(others, 0), top_k_weights.masked_fill(others, 0)
        experts, order = torch.sort(top_k_index.flatten(), stable=True)
        all_experts = torch.arange(self.gate_up.experts, device=experts.device)
        offsets = torch.searchsorted(experts, all_experts, right=True, out_int32=True)
        y = self.gate_up(hidden_states[order // top_k], offsets)
        y = self.down(cast(Any, self.shell)._apply_gate(y), offsets)
        y = y * top_k_weights.flatten()[order, None]
        sums = y[torch.argsort(order)].view(-1, top_k, y.shape[-1]).sum(1)  # no atomics: always in the same order
        sums = sums.to(hidden_states.dtype)
        if sharding is not None:
            from .integrations.tensor_parallel import summed

            sums = summed(sums, sharding)
        return sums

    def to_experts(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The original module with the dequantized weights."""
        experts = shell_of(self.shell)
        for parameter, name in PROJECTIONS.items():
            experts.register_parameter(parameter, nn.Parameter(getattr(self, name).dequantize(dtype)))
        return experts.train(self.training)


def shell_of(experts: nn.Module) -> nn.Module:
    """A copy of the module without its weights, which shares everything else."""
    shell = copy.copy(experts)
    shell._parameters = {}
    shell._modules = dict(experts._modules)
    shell._is_hf_initialized = True  # type: ignore[assignment]  # transformers must not look for weights to initialize
    return shell


def layer_of(parameter: str) -> str | None:
    """The layer that a parameter of an unquantized model is the weight of; None if it is no weight."""
    parent, _, leaf = parameter.rpartition(".")
    return f"{parent}.{PROJECTIONS[leaf]}" if leaf in PROJECTIONS else parent if leaf == "weight" else None


@dataclass(frozen=True)
class Projection:
    """A projection of an unquantized experts module: ``weight`` [experts, n, k]."""

    weight: nn.Parameter

    @property
    def experts(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """Rows of all experts."""
        return self.weight.shape[0] * self.weight.shape[1]

    @property
    def in_features(self) -> int:
        return self.weight.shape[2]


def is_experts(module: nn.Module) -> bool:
    """Whether this is a module of experts as above: with a gate, without biases, not transposed."""
    weights = module._parameters
    if weights.keys() != PROJECTIONS.keys() or not hasattr(module, "_apply_gate"):
        return False
    if getattr(module, "is_transposed", True) or getattr(module, "has_bias", True):
        return False
    gate_up, down = weights["gate_up_proj"], weights["down_proj"]
    if gate_up is None or down is None or gate_up.dim() != 3 or down.dim() != 3:
        return False
    experts, n, k = gate_up.shape
    return tuple(down.shape) == (experts, k, n // 2)


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The unquantized experts of ``model``."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def place_layers(model: nn.Module, layers: Mapping[str, HiggsLinear]) -> None:
    """Puts quantized layers into ``model``, the two projections of experts together."""
    grouped: dict[str, dict[str, HiggsGrouped]] = {}
    for name, layer in layers.items():
        if isinstance(layer, HiggsGrouped):
            parent, _, projection = name.rpartition(".")
            grouped.setdefault(parent, {})[projection] = layer
        else:
            model.set_submodule(name, layer)
    for name, pair in grouped.items():
        model.set_submodule(name, HiggsExperts(shell_of(model.get_submodule(name)), **pair))


def require_pairs(layers: Iterable[str], chosen: Container[str], skipped: dict[str, str]) -> list[str]:
    """Of the projections ``layers`` those among ``chosen`` that have to stay because the other projection of their
    experts is in ``skipped``, to which they are added.

    Raises ValueError if the other one is in neither: experts are quantized with both projections or not at all.
    """
    left = []
    for layer in layers:
        parent, _, projection = layer.rpartition(".")
        (other,) = (f"{parent}.{name}" for name in PROJECTIONS.values() if name != projection)
        if layer not in chosen or other in chosen:
            continue
        if other not in skipped:
            raise ValueError(f"{layer} is to be quantized, {other} is not: take both or none")
        skipped[layer] = f"{other} cannot be quantized"
        left.append(layer)
    return left


def other_experts(model: nn.Module) -> dict[str, str]:
    """{module: reason} for experts that are kept as 3-D parameters in another way, and so cannot be quantized."""
    reason = "experts with biases, transposed weights or no gate are not supported"
    return {
        name: reason
        for name, module in model.named_modules()
        if "experts" in name and any(p.dim() == 3 for p in module.parameters(recurse=False)) and not is_experts(module)
    }


def projections(model: nn.Module) -> dict[str, Projection]:
    """The projections of all unquantized experts of ``model``, by the names of the layers they become."""
    return {
        f"{name}.{layer}": Projection(module._parameters[parameter])  # type: ignore[arg-type]
        for name, module in experts_modules(model).items()
        for parameter, layer in PROJECTIONS.items()
    }


@contextmanager
def recorded_inputs(model: nn.Module, context: int, record: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, ``record`` gets what the projections of unquantized experts read of windows of ``context`` tokens,
    but the first of each: the layer's name and [rows, k]. The input of ``down`` is computed for this, expert by expert.
    """

    def hook(name: str, module: Any, args: tuple, kwargs: dict) -> None:
        x, experts, _ = (*args, *kwargs.values())
        later = torch.arange(len(x), device=x.device) % context > 0
        x, experts = x[later], experts[later]
        record(f"{name}.gate_up", x)
        for e in experts.unique().tolist():
            rows = x[(experts == e).any(-1)]
            record(f"{name}.down", module._apply_gate(nn.functional.linear(rows, module.gate_up_proj[e])))

    handles = [
        module.register_forward_pre_hook(partial(hook, name), with_kwargs=True)
        for name, module in experts_modules(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
