"""Tensor parallelism of transformers (``distributed_config``): a rank's shard of a layer as a layer of its own.

transformers slices the parameters of a layer along their rows or, of o_proj and down_proj, along their columns, and
loads each rank's share. Rows are independent. The signs of columns go by their number in the whole layer, so that a
shard of columns has another seed (:meth:`LayerFormat.with_columns`), and it must not cut a scale group in two.

Of the experts of a mixture every rank has some of the rows and columns of all or, in expert parallelism, some experts
whole; either way the results of all ranks add up.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard  # what transformers shards packed rows by

from ..embedding import HiggsEmbedding
from ..errors import UnsupportedError
from ..linear import HiggsLinear, constant
from ..moe import PROJECTIONS, HiggsExperts, HiggsGrouped


def refuse_unsupported(config: Any) -> None:
    """Raises UnsupportedError for a ``distributed_config`` other than of tensor or expert parallelism."""
    for kind, size in (("fsdp_size", config.fsdp_size), ("pp_size", config.pp_size)):
        if size is not None and size > 1:
            raise UnsupportedError(f"{kind} = {size} is not supported for quantized models; use tp_plan or tp_size")


def before_loading(name: str, module: HiggsLinear) -> None:
    """Hides the column scale, which has no rows, from the plan that would slice it like the rest: as a buffer it is
    loaded whole. Raises UnsupportedError for an embedding."""
    if isinstance(module, HiggsEmbedding):
        raise UnsupportedError(f"{name}: quantized embeddings are not supported with distributed_config or tp_plan")
    column_scale = module.column_scale
    if column_scale is not None:
        del module.column_scale
        module.register_buffer("column_scale", column_scale.data)


def plan_experts(model: Any, name: str, experts: HiggsExperts) -> None:
    """Has the packed tensors of ``experts``, the module ``name`` of ``model``, sliced as the plan of the model says of
    the parameters in their place. Raises UnsupportedError for a plan that slices these in another way."""
    from transformers.distributed.tensor_parallel import (
        ALL_PARALLEL_STYLES,
        PackedColwiseParallel,
        replace_layer_number_by_wildcard,
    )

    given = model.config.distributed_config.tp_plan
    plan = given if isinstance(given, dict) else model.tp_plan
    # Rows of all experts are one below the other; a rank gets its share of the gate of each and of what it gates.
    matrices = 2 * experts.gate_up.experts
    packed_rows = f"higgs_{matrices}_packed_colwise"
    ALL_PARALLEL_STYLES[packed_rows] = PackedColwiseParallel(split_factor=matrices)
    styles = {"packed_colwise": packed_rows, "rowwise": "rowwise", "grouped_gemm": "colwise"}
    generic = replace_layer_number_by_wildcard(name)
    for parameter, projection in PROJECTIONS.items():
        style = plan.get(f"{generic}.{parameter}")
        if style is None:
            continue  # every rank has the whole
        if style not in styles:
            raise UnsupportedError(f"{name}.{projection} cannot be sharded by {style!r}; only by {', '.join(styles)}")
        for tensor in ("indices", "scales"):
            plan[f"{generic}.{projection}.{tensor}"] = styles[style]


def after_loading(name: str, module: HiggsLinear) -> None:
    """Makes plain tensors of what transformers has sharded, with the format and the column scale of this rank's shard.

    Raises UnsupportedError for a shard that begins or ends within a scale group, and for ranks that would have
    different numbers of rows or experts.
    """
    column_scale = module._buffers.pop("column_scale", None)
    if column_scale is not None:
        module.register_parameter("column_scale", constant(column_scale))
    indices, scales = module.indices, module.scales
    if not (isinstance(indices, DTensor) and isinstance(scales, DTensor)):
        return
    mesh, placement, whole = indices.device_mesh, indices.placements[0], module.format
    if not isinstance(placement, Shard | _StridedShard) or (isinstance(placement, _StridedShard) and placement.dim):
        raise UnsupportedError(f"layer {name} cannot be sharded by {placement}; only along its rows or its columns")
    if placement.dim == 0:
        _check_rows(name, module, placement, mesh.size())
        module.format = whole.with_rows(len(indices.to_local()))
    else:
        k = whole.k // mesh.size()
        first = mesh.get_local_rank() * k
        try:
            module.format = whole.with_columns(first, k)
        except ValueError as e:
            raise UnsupportedError(f"layer {name} in {mesh.size()} ranks of tensor parallelism: {e}") from e
        if column_scale is not None:
            module.column_scale = constant(column_scale[first : first + k].clone())
    module.out_features, module.in_features = module.format.n, module.format.k
    module.indices, module.scales = constant(indices.to_local()), constant(scales.to_local())
    module.sharding = (mesh, placement)


def _check_rows(name: str, module: HiggsLinear, placement: Any, ranks: int) -> None:
    """Raises UnsupportedError for matrices or experts that the ranks cannot share evenly. Of experts that are not cut,
    ``module`` has those of this rank from now on."""
    if isinstance(placement, _StridedShard):
        if (rows := module.out_features // placement.split_factor) % ranks:
            raise UnsupportedError(f"layer {name}: {ranks} ranks of tensor parallelism cannot share {rows} rows")
    elif isinstance(module, HiggsGrouped):
        if module.experts % ranks:
            raise UnsupportedError(f"layer {name}: {ranks} ranks cannot share {module.experts} experts")
        module.experts //= ranks


def summed(y: Tensor, sharding: tuple[Any, Any]) -> Tensor:
    """The sum of ``y`` over the ranks that share a layer."""
    partial = DTensor.from_local(y, sharding[0], [Partial()], run_check=False)
    return partial.redistribute(placements=[Replicate()]).to_local()


def gathered(tensor: Tensor, sharding: tuple[Any, Any]) -> DTensor:
    """A rank's share of ``indices``, ``scales`` or (of columns) ``column_scale``, which saving makes whole again."""
    mesh, placement = sharding
    return DTensor.from_local(tensor, mesh, [placement if tensor.dim() > 1 else Shard(0)], run_check=False)
