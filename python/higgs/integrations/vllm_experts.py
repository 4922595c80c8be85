"""Experts of a mixture in vLLM: each rank has its share of the rows and columns of all of them or, with expert
parallelism, whole experts."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.model_executor.utils import set_weight_attrs

from ..config import LayerConfig
from ..errors import FormatError, UnsupportedError
from ..linear import constant
from ..moe import HiggsExperts, HiggsGrouped
from .vllm_parts import Part, quantized

if TYPE_CHECKING:
    from .vllm import HiggsVllmConfig

_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)
# What vLLM calls the parameter that is a projection, and the matrices of one expert in it, in the order of their rows.
_PARAMETERS = {"gate_up": ("w13_weight", ("w1", "w3")), "down": ("w2_weight", ("w2",))}


class _Projection(Part):
    """A rank's share of one projection of all experts.

    ``own`` [experts of the rank, matrices of each, rows of each] says where these rows are in the whole, in which every
    matrix has ``n``.
    """

    def __init__(
        self, name: str, config: LayerConfig, own: Tensor, n: int, k: int, first_column: int, columns: int
    ) -> None:
        """Raises ValueError if the columns cut a scale group."""
        experts, matrices, _ = own.shape
        whole = config.format(name, cast(int, config.experts) * matrices * n, k)
        fmt = whole.with_rows(own.numel()).with_columns(first_column, columns)
        module = HiggsGrouped(fmt, experts, column_scale=config.column_scale, device="meta")
        super().__init__(name, whole, own.flatten(), first_column, module)
        self.own, self.n = own, n
        self.missing = {(expert, matrix) for expert in range(experts) for matrix in range(matrices)}

    def load_matrix(self, expert: int, matrix: int, weight: Tensor, device: torch.device) -> None:
        """Quantizes what the rank has of ``weight`` [n, k], a matrix of its ``expert``."""
        module, fmt = self.module, self.module.format
        if list(weight.shape) != [self.n, self.whole.k]:
            raise FormatError(
                f"{self.name}: an expert's weight is {list(weight.shape)}, expected {[self.n, self.whole.k]}"
            )
        columns = slice(self.first_column, self.first_column + fmt.k)
        rows = self.own[expert, matrix] % self.n
        weight = weight[rows.to(weight.device), columns].to(device)
        tensors = quantized(f"{self.name} (expert {expert} of this rank)", weight, fmt.with_rows(len(rows)))
        first = (expert * self.own.shape[1] + matrix) * len(rows)
        for kind, tensor in zip(("indices", "scales"), tensors, strict=True):
            if getattr(module, kind).is_meta:
                setattr(module, kind, constant(torch.empty_like(getattr(module, kind), device=device)))
            getattr(module, kind)[first : first + len(rows)] = tensor
        self.missing.discard((expert, matrix))

    def check(self, quantizing: bool) -> None:
        if quantizing and self.missing:
            raise FormatError(f"the checkpoint lacks {len(self.missing)} of the weights of {self.name}")
        super().check(quantizing)


class _Shell(nn.Module):
    """What is between the projections."""

    def __init__(self, activation: MoEActivation) -> None:
        super().__init__()
        self.activation = activation

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        y = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        return apply_moe_activation(self.activation, y, gate_up)


class HiggsExpertsMethod(FusedMoEMethodBase):
    """The experts of one layer of a model. ``configs``: their layers in the checkpoint, gate_up and down."""

    def __init__(self, owner: HiggsVllmConfig, layer: Any, configs: dict[str, LayerConfig]) -> None:
        super().__init__(layer.moe_config)
        self.owner, self.configs = owner, configs
        self.parts: dict[str, _Projection] = {}
        self.device = torch.empty(0).device
        refuse_unsupported(layer)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **kwargs: Any,
    ) -> None:
        """Makes the projections, without memory. Tensors of stored ones come to ``load_weights``; weights to quantize
        through empty parameters with the names that vLLM's own loading expects."""
        moe, count = self.moe, intermediate_size_per_partition
        # All rows or columns, the first one of the rank, how many it has.
        whole, share = (hidden_size, 0, hidden_size), (count * moe.tp_size, count * moe.tp_rank, count)
        of_projection = {"gate_up": (2, share, whole), "down": (1, whole, share)}  # matrices, their rows, columns
        for name, config in self.configs.items():
            projection = name.rpartition(".")[2]
            matrices, rows, columns = of_projection[projection]
            if config.experts != moe.num_logical_experts:
                raise FormatError(
                    f"quantization_config of {name} says {config.experts} experts, there are {moe.num_logical_experts}"
                )
            own = _own_rows(layer, matrices, *rows)
            try:
                self.parts[projection] = _Projection(name, config, own, rows[0], *columns)
            except ValueError as e:
                raise UnsupportedError(f"layer {name} in {moe.tp_size} ranks of tensor parallelism: {e}") from e
        if self.owner.plan is None:
            refuse_own_loader(layer)
            layer.load_weights = self._load_stored
            return
        for projection, (parameter, shards) in _PARAMETERS.items():
            empty = constant(torch.empty(0, dtype=params_dtype))
            set_weight_attrs(empty, {"weight_loader": partial(self._load_weight, layer, projection, shards)})
            layer.register_parameter(parameter, empty)

    def _load_stored(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """In place of the method of ``RoutedExperts``; names go on from that of the experts."""
        for name, tensor in weights:
            projection, _, kind = name.partition(".")
            if projection not in self.parts or kind not in ("indices", "scales", "column_scale"):
                raise FormatError(f"the experts of {', '.join(self.configs)} have an unexpected tensor {name}")
            self.parts[projection].load(kind, tensor, self.device)
            yield name

    def _load_weight(
        self, layer: Any, projection: str, shards: tuple[str, ...], param: nn.Parameter, loaded_weight: Tensor,
        weight_name: str, shard_id: str, expert_id: int, return_success: bool = False,
    ) -> bool | None:  # fmt: skip
        """The loader of a parameter, called for each expert and matrix; False for an expert of another rank."""
        expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if expert >= 0:
            self.parts[projection].load_matrix(expert, shards.index(shard_id), loaded_weight, self.device)
        return expert >= 0 if return_success else None

    def process_weights_after_loading(self, layer: Any) -> None:
        self.owner.check_all_found()
        for part in self.parts.values():
            part.check(self.owner.plan is not None)
        for parameter, _ in _PARAMETERS.values():
            if parameter in layer._parameters:
                delattr(layer, parameter)
        layers = {name: cast(HiggsGrouped, part.module.tile_()) for name, part in self.parts.items()}
        layer.higgs = HiggsExperts(_Shell(layer.activation), **layers)
        self.parts = {}

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """``x`` [t, h], and of each token the experts ``topk_ids`` [t, k] and their weights -> [t, h], of which the sum
        over the ranks is the result."""
        experts = topk_ids.long()
        if layer.expert_map is not None:  # experts of other ranks: any other one, which counts nothing
            experts = layer.expert_map[experts].long()
            topk_weights, experts = topk_weights.masked_fill(experts < 0, 0), experts.clamp_min(0)
        return layer.higgs(x, experts, topk_weights)


def refuse_unsupported(layer: Any) -> None:
    """Raises UnsupportedError for experts that compute something else, and for other ways to share them."""
    moe = layer.moe_config
    parallel = moe.moe_parallel_config
    on_cuda = torch.device(moe.device).type == "cuda"
    reasons = {
        "experts with biases": moe.has_bias,
        f"experts with the activation {moe.activation.value}": moe.activation not in _ACTIVATIONS,
        "experts with a limit of their activation": moe.swiglu_limit is not None,
        "router weights applied to the input of experts": layer.apply_router_weight_on_input,
        "experts in data, sequence or context parallelism": (
            parallel.dp_size > 1 or parallel.pcp_size > 1 or parallel.is_sequence_parallel
        ),
        f"experts in {moe.in_dtype} in CUDA graphs (use --dtype bfloat16 or --enforce-eager)": (
            on_cuda and moe.in_dtype != torch.bfloat16 and bool(moe.max_capture_size)
        ),
    }
    for what, refused in reasons.items():
        if refused:
            raise UnsupportedError(f"{layer.layer_name}: {what}: not supported by higgs in vLLM")


def refuse_own_loader(layer: Any) -> None:
    """Raises UnsupportedError where the model of vLLM looks up every tensor of experts by a list of names of its own,
    rather than letting the experts take theirs."""
    config = get_current_vllm_config().model_config
    model, model_type = get_model_cls(config), config.hf_config.model_type
    if "make_expert_params_mapping" in inspect.getsource(sys.modules[model.__module__]):
        raise UnsupportedError(
            f"{layer.layer_name}: {model.__name__} of vLLM does not read stored experts of {model_type}; "
            "serve the unquantized checkpoint, which vLLM then quantizes while loading (hf_overrides), or quantize it "
            "with the experts left out (skip=['experts'])"
        )


def _own_rows(layer: Any, matrices: int, n: int, first: int, count: int) -> Tensor:
    """[experts of this rank, matrices, count]: where rows ``first`` to ``first + count - 1`` of every matrix of its
    experts are among those of all experts, which have ``matrices`` of ``n`` rows each."""
    rows = torch.arange(layer.moe_config.num_logical_experts * matrices * n, device="cpu").view(-1, matrices, n)
    if layer.expert_map is not None:
        expert_map = layer.expert_map.cpu()
        local = (expert_map >= 0).nonzero().flatten()
        rows = rows[local[expert_map[local].argsort()]]
    return rows[:, :, first : first + count]
