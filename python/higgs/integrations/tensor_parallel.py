"""Tensor parallelism of transformers (``distributed_config``): a rank's shard of a layer as a layer of its own.

transformers slices the parameters of a layer along their rows or, of o_proj and down_proj, along their columns, and
loads each rank's share. Rows are independent. The signs of columns go by their number in the whole layer, so that a
shard of columns has another seed (:meth:`LayerFormat.with_columns`), and it must not cut a scale group in two.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ..embedding import HiggsEmbedding
from ..errors import UnsupportedError
from ..linear import HiggsLinear, constant


def before_loading(name: str, module: HiggsLinear) -> None:
    """Hides the column scale, which has no rows, from the plan that would slice it like the rest: as a buffer it is
    loaded whole. Raises UnsupportedError for an embedding."""
    if isinstance(module, HiggsEmbedding):
        raise UnsupportedError(f"{name}: quantized embeddings are not supported with distributed_config or tp_plan")
    column_scale = module.column_scale
    if column_scale is not None:
        del module.column_scale
        module.register_buffer("column_scale", column_scale.data)


def after_loading(name: str, module: HiggsLinear) -> None:
    """Makes plain tensors of what transformers has sharded, with the format and the column scale of this rank's shard.

    Raises UnsupportedError for a shard that begins or ends within a scale group.
    """
    column_scale = module._buffers.pop("column_scale", None)
    if column_scale is not None:
        module.register_parameter("column_scale", constant(column_scale))
    indices, scales = module.indices, module.scales
    if not (isinstance(indices, DTensor) and isinstance(scales, DTensor)):
        return
    mesh, placements = indices.device_mesh, tuple(indices.placements)
    if len(placements) != 1 or type(placements[0]) is not Shard:
        raise UnsupportedError(f"layer {name} cannot be sharded by {placements}; only along its rows or its columns")
    whole, dim = module.format, placements[0].dim % 2
    if dim == 0:
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
    module.sharding = (mesh, dim)


def gathered(tensor: Tensor, sharding: tuple[Any, int]) -> DTensor:
    """A rank's share of ``indices``, ``scales`` or (of columns) ``column_scale``, which saving makes whole again."""
    mesh, dim = sharding
    return DTensor.from_local(tensor, mesh, [Shard(min(dim, tensor.dim() - 1))], run_check=False)
