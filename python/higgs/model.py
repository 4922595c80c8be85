"""Quantizing a model that is in memory."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from . import _core
from ._ops import LayerFormat, layer_format
from .config import LayerConfig, QuantizationConfig
from .embedding import input_embedding, quantized_class, tied_message
from .energies import (
    Energies,
    own_energies,
    pooled_column_scales,
    quantizable_layers,
    weight_energy,
)
from .errors import UnsupportedError
from .linear import HiggsLinear, as_linear, is_conv1d
from .moe import HiggsExperts, HiggsGrouped, Projection, other_experts, place_layers, projections, require_pairs
from .patterns import compiled
from .progress import NullProgress, Progress
from .report import LayerReport, Report
from .seeds import layer_seeds
from .shared_inputs import share_inputs_


def quantize_(
    model: nn.Module,
    *,
    bits: float | None = None,
    grid: str | None = None,
    allocation: Mapping[str, str] | None = None,
    lm_head_grid: str | None = None,
    embedding_grid: str | None = None,
    scales: str | Energies = "self",
    scale_exponent: float = 0.25,
    skip: Iterable[str] = (),
    block: int | None = None,
    group: int | None = None,
    seed: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Replaces the Linear modules of ``model``, and the Conv1D of transformers, by :class:`HiggsLinear`, and experts of
    a mixture that transformers keeps as 3-D parameters by :class:`~higgs.moe.HiggsExperts`, in place (arXiv 2411.17525,
    algorithm 1).

    Exactly one of ``bits`` (the uniform grid of that rate), ``grid`` (its name) and ``allocation`` ({layer name: grid
    name}; other layers stay) says what to use. The output head is left alone unless ``lm_head_grid`` says what for (or
    ``allocation`` names it), the input embedding unless ``embedding_grid`` does, and so are layers whose name matches a
    regular expression in ``skip``. A head that is tied to a quantized embedding must be quantized, too: each then has
    tensors of its own.

    ``scales``: column scales from input energies over text that the model samples ("self") or over "random" tokens
    (quicker, a little worse), for both of which it is run; from an :class:`~higgs.energies.Energies`; or "none".

    Layers with in_features not divisible by 64 stay as they are and are reported; with ``strict`` they are an error.
    Nothing is replaced if any layer fails.
    """
    progress = progress or NullProgress()
    report = Report()
    formats, report.skipped = plan_formats(
        model, bits=bits, grid=grid, allocation=allocation, lm_head_grid=lm_head_grid, embedding_grid=embedding_grid,
        skip=skip, block=block, group=group, seed=seed, strict=strict,
    )  # fmt: skip
    layers = unquantized_layers(model)

    column_scales = {}
    energies = _energies(model, scales, seed, progress)
    if energies is not None:
        seeds = layer_seeds(seed, formats, energies)
        formats = {name: replace(fmt, seed=seeds[name]) for name, fmt in formats.items()}
        weight_energies = {name: weight_energy(as_linear(layers[name]).weight) for name in formats}
        blocks = {name: f.block for name, f in formats.items()}
        column_scales = pooled_column_scales(energies, weight_energies, blocks, scale_exponent)

    replacements: dict[str, HiggsLinear] = {}
    progress.start("quantize", len(formats))
    for name, fmt in formats.items():
        start = time.perf_counter()
        column_scale = column_scales.get(name)
        replacements[name], t2 = quantized_layer(name, layers[name], fmt, column_scale)
        seconds = time.perf_counter() - start
        report.layers.append(LayerReport.of(name, fmt, column_scale=column_scale is not None, t2=t2, seconds=seconds))
        progress.advance()
    progress.finish()
    place_layers(model, replacements)
    share_inputs_(model)
    _attach_config(model)
    return report


def plan_formats(
    model: nn.Module,
    *,
    bits: float | None = None,
    grid: str | None = None,
    allocation: Mapping[str, str] | None = None,
    lm_head_grid: str | None = None,
    embedding_grid: str | None = None,
    skip: Iterable[str] = (),
    block: int | None = None,
    group: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> tuple[dict[str, LayerFormat], dict[str, str]]:
    """What :func:`quantize_` makes of the layers with these arguments and no energies: {layer: format}, and {layer:
    reason} for those it leaves alone. Reads names and shapes only; the model may be on the meta device."""
    formats: dict[str, LayerFormat] = {}
    skipped: dict[str, str] = {}
    uniform = grid_of_all(bits, grid, allocation, lm_head_grid, embedding_grid)
    grids = _grids_of_layers(model, uniform, allocation, skip)
    if lm_head_grid is not None:
        grids[head_name(model)] = lm_head_grid
    if embedding_grid is not None:
        grids[embedding_name(model)] = embedding_grid
    _check_tied(model, grids)
    layers = unquantized_layers(model)
    for name, grid_name in grids.items():
        layer = as_linear(layers[name])
        if layer.in_features % 64 != 0:
            skipped[name] = f"in_features = {layer.in_features} is not a multiple of 64"
            if strict:
                raise UnsupportedError(f"layer {name} cannot be quantized: {skipped[name]}")
            continue
        formats[name] = layer_format(
            layer.out_features, layer.in_features, grid_name, block=block, group=group, seed=seed
        )
    if allocation is None:
        skipped.update(others := other_experts(model))
        if others and strict:
            name, reason = next(iter(others.items()))
            raise UnsupportedError(f"layer {name} cannot be quantized: {reason}")
    for name in require_pairs(projections(model), formats, skipped):
        del formats[name]
    if not formats:
        raise UnsupportedError("the model has no Linear layer that can be quantized")
    seeds = layer_seeds(seed, formats)
    return {name: replace(fmt, seed=seeds[name]) for name, fmt in formats.items()}, skipped


def head_name(model: nn.Module) -> str:
    """The name of the output head. Raises UnsupportedError if there is none, or none that is a Linear."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    for name, module in model.named_modules():
        if module is head and type(module) is nn.Linear:
            return name
    raise UnsupportedError("lm_head_grid: the model has no output head that is a Linear layer")


def embedding_name(model: nn.Module) -> str:
    """The name of the input embedding. Raises UnsupportedError if there is none, or one of another class."""
    name = input_embedding(model)
    if name is None:
        raise UnsupportedError("embedding_grid: the model has no input embedding that is an nn.Embedding itself")
    return name


def tied_head(model: nn.Module) -> str | None:
    """The name of the output head if its weight is, or will be when it is loaded, that of the input embedding."""
    embedding = input_embedding(model)
    weight = None if embedding is None else model.get_submodule(embedding).weight
    planned = getattr(model, "all_tied_weights_keys", {})  # of transformers: {tied parameter: where it is}
    modules = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear]
    tied = (name for name, m in modules if m.weight is weight or planned.get(f"{name}.weight") == f"{embedding}.weight")
    return next(tied, None)


def _check_tied(model: nn.Module, chosen: Container[str]) -> None:
    head, embedding = tied_head(model), input_embedding(model)
    if head is not None and embedding in chosen and head not in chosen:
        raise ValueError(tied_message(cast(str, embedding), head))


def grid_of_all(
    bits: float | None,
    grid: str | None,
    allocation: Mapping[str, str] | None,
    lm_head_grid: str | None = None,
    embedding_grid: str | None = None,
) -> str | None:
    """The one grid that ``bits`` or ``grid`` asks for, None with an ``allocation``.

    Raises ValueError unless exactly one is given, and for grids and rates that do not exist.
    """
    if sum(option is not None for option in (bits, grid, allocation)) != 1:
        raise ValueError("give exactly one of bits, grid and allocation")
    if not isinstance(allocation, Mapping | None):
        raise TypeError(f"allocation is of {type(allocation)}; use {{layer name: grid name}}, `grids` of an Allocation")
    if lm_head_grid is not None and allocation is not None:
        raise ValueError("lm_head_grid and allocation: name the head in the allocation")
    if embedding_grid is not None and allocation is not None:
        raise ValueError("embedding_grid and allocation: name the embedding in the allocation")
    for name in [*(allocation or {}).values(), lm_head_grid, embedding_grid]:
        if name is not None:
            _core.find_grid(name)
    if allocation is not None:
        return None
    return _core.find_grid(grid).name if grid is not None else _core.grid_for_bits(cast(float, bits)).name


def _grids_of_layers(
    model: nn.Module, grid: str | None, allocation: Mapping[str, str] | None, skip: Iterable[str]
) -> dict[str, str]:
    patterns = compiled("skip", skip)
    if type(model) is nn.Linear:
        raise UnsupportedError("the model is a Linear layer itself; use HiggsLinear.from_linear")
    if any(isinstance(m, HiggsLinear) for m in model.modules()):
        raise UnsupportedError("the model is quantized already; quantize the original, or call higgs.dequantize_ first")
    if allocation is not None:
        known = unquantized_layers(model)
        for name in allocation:
            if name not in known:
                raise ValueError(f"allocation names {name!r}, which is no Linear layer of the model")
        return dict(allocation)
    layers = [*quantizable_layers(model), *projections(model)]
    return {name: cast(str, grid) for name in layers if not any(pattern.search(name) for pattern in patterns)}


def unquantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All that can be quantized, the output head too: Linear and Conv1D modules, the input embedding, and a
    :class:`~higgs.moe.Projection` for each projection of experts."""
    modules = {name: m for name, m in model.named_modules() if type(m) is nn.Linear or is_conv1d(m)}
    embedding = input_embedding(model)
    if embedding is not None:
        modules[embedding] = model.get_submodule(embedding)
    return {**modules, **cast(dict[str, nn.Module], projections(model))}


def quantized_layer(
    name: str, layer: nn.Module | Projection, fmt: LayerFormat, column_scale: Tensor | None = None
) -> tuple[HiggsLinear, float]:
    """The quantized layer and its t2; errors tell the layer."""
    try:
        if isinstance(layer, Projection):
            return HiggsGrouped.from_weight(layer.weight, fmt, column_scale)
        return quantized_class(layer).from_linear(layer, fmt, column_scale)
    except ValueError as e:
        raise ValueError(f"layer {name}: {e}") from e


def _energies(model: nn.Module, scales: str | Energies, seed: int, progress: Progress) -> Energies | None:
    if isinstance(scales, Energies):
        return scales
    if scales == "none":
        return None
    if scales not in ("random", "self"):
        raise ValueError(f"scales {scales!r} is not supported; use 'self', 'random', 'none' or an Energies object")
    if getattr(model, "config", None) is None:
        raise UnsupportedError(f"scales={scales!r} needs a model with a config (vocab_size); use 'none' or Energies")
    return own_energies(model, scales, seed=seed, progress=progress)


def quantization_config(model: nn.Module) -> QuantizationConfig:
    """What a checkpoint of ``model`` has to say about its HiggsLinear layers."""
    modules = {name: m for name, m in model.named_modules() if isinstance(m, HiggsLinear)}
    return QuantizationConfig(
        {
            name: LayerConfig.of(m.format, column_scale=m.column_scale is not None, experts=getattr(m, "experts", None))
            for name, m in modules.items()
        }
    )


def _attach_config(model: nn.Module) -> None:
    """Makes ``model.save_pretrained`` of a transformers model write a quantized checkpoint."""
    if hasattr(model, "save_pretrained"):
        from .integrations.transformers import attach

        attach(model, quantization_config(model))


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces every quantized module by an ordinary one with the dequantized weights, in place, and returns ``model``.

    ``dtype``: of the weights; default the model's own. Raises UnsupportedError, and changes nothing, if a layer is a
    shard of tensor parallelism.
    """
    dtype = dtype or getattr(model, "dtype", None) or torch.float32
    for module in model.modules():
        if isinstance(module, HiggsLinear):
            module.require_whole()
    for name, module in list(model.named_modules()):
        if isinstance(module, HiggsExperts):
            model.set_submodule(name, module.to_experts(dtype))
        elif isinstance(module, HiggsLinear) and not isinstance(module, HiggsGrouped):
            model.set_submodule(name, module.to_linear(dtype))
    share_inputs_(model, False)
    if hasattr(model, "save_pretrained"):
        from .integrations.transformers import detach

        detach(model)
    return model
