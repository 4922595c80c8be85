"""What quantizing a checkpoint will write: decided from headers alone, before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from .. import _core
from .._ops import LayerFormat, layer_format
from ..config import GUARD, guarded
from ..embedding import tied_message
from ..moe import require_pairs
from ..seeds import layer_seeds
from .experts import ExpertsLayer
from .files import SINGLE_FILE, Checkpoint, TensorSpec
from .layers import LinearWeights, find_linear_weights, layer_name

if TYPE_CHECKING:
    from ..energies import Energies

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Options:
    """The choices that decide every byte of the output, besides the source, the input energies and, where there is an
    allocation (``grid`` then says how it was made), the grids it gives."""

    grid: str
    lm_head_grid: str | None = None
    embedding_grid: str | None = None
    block: int | None = None
    group: int | None = None
    seed: int = 0
    scale_exponent: float = 0.25


@dataclass(frozen=True)
class LayerPlan:
    """The tensors ``sources`` (one, but for ``experts``, whose rows they are one below the other; it is ``transposed``
    if it has the rows as its columns) become the tensors ``name``.indices, ``name``.scales (and .column_scale). Input
    energies know the layer as ``module``; of an ``outer`` one, the output head or the embedding, they know nothing."""

    name: str
    module: str
    sources: tuple[str, ...]
    fmt: LayerFormat
    outer: bool = False
    experts: int | None = None
    transposed: bool = False
    guard: bool = False  # whether it has the guard of the checkpoint

    def specs(self, column_scale: bool) -> dict[str, TensorSpec]:
        n, k = self.fmt.n, self.fmt.k
        specs = {
            f"{self.name}.indices": TensorSpec.of(torch.uint8, n, self.fmt.row_bytes),
            f"{self.name}.scales": TensorSpec.of(torch.float16, n, self.fmt.row_groups),
        }
        if column_scale:
            specs[f"{self.name}.column_scale"] = TensorSpec.of(torch.float16, k)
        if self.guard:
            specs[f"{self.name}.weight"] = TensorSpec.of(torch.uint8, len(GUARD))
        return specs


@dataclass
class ShardPlan:
    """One output file: the layers quantized into it and the tensors copied bit for bit."""

    name: str
    source: str
    layers: list[LayerPlan] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """All output shards; ``unties`` says that a head tied to the embedding gets tensors of its own."""

    shards: list[ShardPlan]
    skipped: dict[str, str]
    notes: list[str]
    unties: bool = False

    @property
    def layers(self) -> list[LayerPlan]:
        return [layer for shard in self.shards for layer in shard.layers]

    def key_signs(self, seed: int, energies: Energies | None) -> None:
        """Gives every layer its own seed, once it is known which layers share an input."""
        seeds = layer_seeds(seed, [layer.module for layer in self.layers], energies)
        for shard in self.shards:
            shard.layers = [replace(x, fmt=replace(x.fmt, seed=seeds[x.module])) for x in shard.layers]


def pick_grid(grid: str | None, bits: float | None) -> str:
    """The grid id of ``grid`` or the uniform choice for ``bits`` (4 if neither is given). ValueError if both are."""
    if grid is not None and bits is not None:
        raise ValueError(f"grid {grid} and bits {bits} are both given; give one")
    if grid is not None:
        return _core.find_grid(grid).name
    return _core.grid_for_bits(4.0 if bits is None else bits).name


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def make_plan(
    checkpoint: Checkpoint, options: Options, *, strict: bool, allocation: Mapping[str, str] | None = None
) -> Plan:
    """All layers on ``options.grid``, or those that ``allocation`` ({module name: grid}) names on theirs.

    Raises ValueError for a source that is quantized already, a block or group that does not fit a layer, a head or an
    embedding that cannot be quantized, an allocation for a layer that is not there, or, if ``strict``, a layer whose k
    is no multiple of 64 (left as it is otherwise)."""
    existing = checkpoint.config.get("quantization_config")
    if existing:
        method = existing.get("quant_method", "unknown") if isinstance(existing, dict) else existing
        raise ValueError(
            f"{checkpoint.path} is already quantized (quant_method {method!r}); quantize the original model"
        )
    linear = find_linear_weights(checkpoint)
    if allocation is not None:
        _check_allocation(checkpoint, linear, allocation)
    planned: dict[str, LayerPlan] = {}
    skipped: dict[str, str] = {}
    for source in sorted(linear.layers, key=natural):
        entry, name = checkpoint.tensors[source], layer_name(source)
        module, transposed = linear.layers[source], source in linear.transposed
        shape = entry.shape[::-1] if transposed else entry.shape
        reason = _obstacle(entry.dtype, shape)
        if reason and strict:
            raise ValueError(f"layer {name} {list(shape)} cannot be quantized: {reason}")
        if not reason and allocation is not None and module not in allocation:
            reason = "not in the allocation"
        if reason:
            skipped[name] = reason
        else:
            grid = options.grid if allocation is None else allocation[module]
            fmt = _format(name, shape, options, grid)
            planned[source] = LayerPlan(name, module, (source,), fmt, transposed=transposed)
    guard = guarded(layer.name for layer in planned.values())
    planned = {source: replace(layer, guard=f"{layer.name}.weight" == guard) for source, layer in planned.items()}
    experts = _plan_experts(checkpoint, linear.experts, skipped, options, strict=strict, allocation=allocation)
    planned.update({layer.sources[0]: layer for layer in experts})
    head_grid = options.lm_head_grid or (allocation or {}).get(linear.head or "")
    if not planned and head_grid is None and options.embedding_grid is None:
        why = "; ".join(dict.fromkeys(skipped.values()))
        raise ValueError(f"{checkpoint.path}: none of the {len(skipped)} Linear layers can be quantized: {why}")
    plan = Plan(_shards(checkpoint, planned), skipped, list(linear.notes))
    if head_grid is not None:
        _plan_head(plan, checkpoint, linear, options, head_grid)
    if options.embedding_grid is not None:
        _plan_embedding(plan, checkpoint, linear, options, options.embedding_grid)
    return plan


def _plan_experts(
    checkpoint: Checkpoint,
    layers: list[ExpertsLayer],
    skipped: dict[str, str],
    options: Options,
    *,
    strict: bool,
    allocation: Mapping[str, str] | None,
) -> list[LayerPlan]:
    planned = {}
    for layer in layers:
        dtypes = {checkpoint.tensors[source].dtype for source in layer.sources}
        shape = (layer.n, layer.k)
        reason = next((r for r in (_obstacle(dtype, shape) for dtype in sorted(dtypes)) if r), None)
        if reason and strict:
            raise ValueError(f"layer {layer.name} {list(shape)} cannot be quantized: {reason}")
        if reason:
            skipped[layer.name] = reason
        elif allocation is None or layer.module in allocation:
            grid = options.grid if allocation is None else allocation[layer.module]
            fmt = _format(layer.name, shape, options, grid)
            planned[layer.name] = LayerPlan(layer.name, layer.module, layer.sources, fmt, experts=layer.experts)
    for name in require_pairs([layer.name for layer in layers], planned, skipped):
        del planned[name]
    left = [layer.name for layer in layers if layer.name not in planned]
    skipped.update({name: "not in the allocation" for name in left if name not in skipped})
    return list(planned.values())


def _check_allocation(checkpoint: Checkpoint, linear: LinearWeights, allocation: Mapping[str, str]) -> None:
    known = {*linear.layers.values(), *(layer.module for layer in linear.experts), linear.head}
    for module, grid in allocation.items():
        _core.find_grid(grid)
        if module not in known:
            raise ValueError(f"the allocation names {module!r}, which is no Linear layer of {checkpoint.path}")


def _obstacle(dtype: str, shape: tuple[int, ...]) -> str | None:
    if dtype not in _FLOATS:
        return f"dtype {dtype} is not one of {', '.join(_FLOATS)}"
    if not all(shape):
        return "it is empty"
    if shape[1] % 64:
        return f"k = {shape[1]} is not a positive multiple of 64"
    return None


def _format(name: str, shape: tuple[int, ...], options: Options, grid: str) -> LayerFormat:
    n, k = shape
    try:
        return layer_format(n, k, grid, block=options.block, group=options.group, seed=options.seed)
    except ValueError as e:
        raise ValueError(f"layer {name} {list(shape)}: {e}") from e


def _shards(checkpoint: Checkpoint, planned: dict[str, LayerPlan]) -> list[ShardPlan]:
    count = len(checkpoint.shards)
    shards = {
        source: ShardPlan(f"model-{i:05}-of-{count:05}.safetensors" if count > 1 else SINGLE_FILE, source)
        for i, source in enumerate(checkpoint.shards, 1)
    }
    used = {source for layer in planned.values() for source in layer.sources}
    for name in sorted(checkpoint.tensors, key=natural):
        shard = shards[checkpoint.tensors[name].shard]
        if name in planned:
            shard.layers.append(planned[name])
        elif name not in used:
            shard.copied.append(name)
    return list(shards.values())


def _plan_head(plan: Plan, checkpoint: Checkpoint, linear: LinearWeights, options: Options, grid: str) -> None:
    """Adds the output head. A tied head is quantized from the embedding, which stays unless it is planned, too."""
    if linear.head is None or linear.head_source is None:
        raise ValueError(f"{checkpoint.path}: no output head to quantize on {grid} was found")
    name = linear.head if linear.tied else layer_name(linear.head_source)
    _plan_outer(plan, checkpoint, name, linear.head, linear.head_source, options, grid)
    plan.unties = linear.tied


def _plan_embedding(plan: Plan, checkpoint: Checkpoint, linear: LinearWeights, options: Options, grid: str) -> None:
    """Adds the input embedding, after the head if that is tied to it."""
    if linear.embedding is None or linear.embedding_source is None:
        raise ValueError(f"{checkpoint.path}: no embedding to quantize on {grid} was found")
    if linear.tied and not plan.unties:
        raise ValueError(tied_message(linear.embedding, linear.head))
    name = layer_name(linear.embedding_source)
    _plan_outer(plan, checkpoint, name, linear.embedding, linear.embedding_source, options, grid)


def _plan_outer(
    plan: Plan, checkpoint: Checkpoint, name: str, module: str, source: str, options: Options, grid: str
) -> None:
    entry = checkpoint.tensors[source]
    reason = _obstacle(entry.dtype, entry.shape)
    if reason:
        raise ValueError(f"layer {module} {list(entry.shape)} cannot be quantized: {reason}")
    fmt = _format(name, entry.shape, options, _core.find_grid(grid).name)
    for shard in plan.shards:
        if f"{name}.weight" in shard.copied:  # tied checkpoints may hold a copy for the head
            shard.copied.remove(f"{name}.weight")
        if shard.source == entry.shard:
            shard.layers.append(LayerPlan(name, module, (source,), fmt, outer=True))


def shard_specs(checkpoint: Checkpoint, shard: ShardPlan, scaled: set[str]) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor of an output shard; layers named in ``scaled`` have a column scale."""
    specs: dict[str, TensorSpec] = {}
    for layer in shard.layers:
        specs.update(layer.specs(layer.name in scaled))
    for name in shard.copied:
        entry = checkpoint.tensors[name]
        specs[name] = TensorSpec(entry.dtype, entry.shape)
    return specs
