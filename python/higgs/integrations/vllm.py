"""vLLM: serves stored checkpoints and, with ``quantization="higgs_quant"``, quantizes ordinary ones as it loads them.

The entry point ``vllm.general_plugins`` makes vLLM import this in each of its processes. A linear layer of vLLM holds
the rows of one or more layers of the checkpoint (``qkv_proj``), or this rank's share of them, and each may have a grid
of its own: they are the :class:`Part` s of the layer, :class:`HiggsLinear` modules to which the tensors of the
checkpoint go as they are read. Parts that differ in nothing but rows are joined after loading.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.utils import set_weight_attrs

from .. import _core
from ..config import QUANT_METHOD, LayerConfig
from ..config import QuantizationConfig as StoredConfig
from ..energies import ROUTER
from ..errors import FormatError, UnsupportedError
from ..linear import HiggsLinear, constant, digest, linear_shared
from ..model import grid_of_all
from ..moe import require_pairs
from ..seeds import layer_seeds
from .transformers import HiggsQuantConfig
from .vllm_experts import HiggsExpertsMethod
from .vllm_parts import Part

logger = init_logger(f"vllm.plugins.{__name__}")
_QKV = {"q": 0, "k": 1, "v": 2}
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte)$")  # models of vLLM do not say what they load into these
_PLAN = ("bits", "grid", "allocation", "skip", "block", "group", "seed", "strict")  # of HiggsQuantConfig


def register() -> None:
    """The entry point. Importing this module has registered the quantization method, as often as vLLM calls it."""


class HiggsLinearMethod(LinearMethodBase):
    """The parts of one layer of vLLM. ``configs`` are the checkpoint's layers in it, in their order."""

    def __init__(self, owner: HiggsVllmConfig, configs: dict[str, LayerConfig]) -> None:
        self.owner, self.configs = owner, configs
        self.kinds = ["weight"] if owner.plan is not None else ["indices", "scales"]
        if any(config.column_scale for config in configs.values()):
            self.kinds.append("column_scale")
        self.parts: list[Part] = []
        self.tied: Any = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **kwargs: Any,
    ) -> None:
        """Makes the parts, without memory, and empty parameters that only hand on what vLLM loads into them."""
        configs = list(self.configs.items())
        if len(configs) == 1:  # fused in the checkpoint already, or not fused at all
            configs *= len(output_partition_sizes)
        if len(configs) != len(output_partition_sizes):
            raise UnsupportedError(
                f"layer {layer.prefix} is made of {', '.join(self.configs)}, but has {len(output_partition_sizes)} "
                f"parts in vLLM: {output_partition_sizes} rows"
            )
        first_column = layer.tp_rank * input_size_per_partition if input_size_per_partition != input_size else 0
        for i, ((name, config), n) in enumerate(zip(configs, output_partition_sizes, strict=True)):
            first_row, rows = _rows(layer, i, n)
            whole = config.format(name, rows, input_size)
            try:
                own = whole.with_rows(n).with_columns(first_column, input_size_per_partition)
            except ValueError as e:
                raise UnsupportedError(f"layer {name} in {layer.tp_size} ranks of tensor parallelism: {e}") from e
            module = HiggsLinear(own, column_scale=config.column_scale, device="meta")
            self.parts.append(Part(name, whole, slice(first_row, first_row + n), first_column, module))
        for kind in dict.fromkeys([*self.kinds, "weight"]):
            dtype = params_dtype if kind == "weight" else getattr(self.parts[0].module, kind).dtype
            parameter = constant(torch.empty(0, dtype=dtype))
            set_weight_attrs(parameter, {"weight_loader": partial(self._load, kind)})
            layer.register_parameter(kind, parameter)

    def _load(self, kind: str, parameter: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
        if kind not in self.kinds:
            return  # the guard of a stored checkpoint (FORMAT.md)
        parts = self.parts
        if shard is not None:
            parts = [parts[_QKV[shard] if isinstance(shard, str) else shard]]
        if kind == "column_scale":
            tensors = [tensor] * len(parts)
        elif len(tensor) == sum(part.whole.n for part in parts):
            tensors = list(tensor.split([part.whole.n for part in parts]))
        else:
            tensors = [tensor] * len(parts)  # of a shape that the part refuses
        for part, share in zip(parts, tensors, strict=True):
            part.load(kind, share, parameter.device)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """A quantized head has tensors of its own; they are made of the embedding's if the checkpoint has none."""
        self.tied = embed_tokens if self.owner.plan is not None else None
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        self.owner.check_all_found()
        if self.tied is not None:
            self.parts[0].quantize(self.tied.weight.detach())
        for part in self.parts:
            part.check("weight" in self.kinds)
        for kind in self.kinds:
            if kind != "weight":  # which stays, empty: latent attention looks for it before it calls the layer
                delattr(layer, kind)
        layer.higgs = nn.ModuleList(module.tile_() for module in _joined([part.module for part in self.parts]))
        self.parts, self.tied = [], None

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., k of this rank] -> y [..., rows of this rank], in the dtype of x."""
        ys = linear_shared(x, list(layer.higgs))
        y = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
        return y if bias is None else y + bias


def _rows(layer: Any, i: int, n: int) -> tuple[int, int]:
    """The first row of this rank's ``n`` rows of part ``i``, and all rows of that part in the checkpoint."""
    if isinstance(layer, ParallelLMHead):
        return layer.shard_indices.org_vocab_start_index, layer.org_vocab_size
    if not isinstance(layer, ColumnParallelLinear):
        return 0, n
    replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and i > 0 else 1
    return layer.tp_rank // replicas * n, layer.tp_size // replicas * n


def _joined(modules: list[HiggsLinear]) -> list[HiggsLinear]:
    """Neighbours of one format and column scale made one module, whose output need not be concatenated."""

    def key(module: HiggsLinear) -> tuple:
        return module.format.with_rows(0), digest(module.column_scale)

    result = []
    for _, group in itertools.groupby(modules, key):
        same = list(group)
        joined = same[0]
        if len(same) > 1:
            stored = [module.stored() for module in same]
            fmt = joined.format.with_rows(sum(module.out_features for module in same))
            joined = HiggsLinear(fmt, device="meta")
            joined.indices, joined.scales = (constant(torch.cat(tensors)) for tensors in zip(*stored, strict=True))
            joined.column_scale = same[0].column_scale
        result.append(joined)
    return result


@register_quantization_config(QUANT_METHOD)
class HiggsVllmConfig(QuantizationConfig):
    """``quantization_config`` as vLLM sees it: the ``layers`` of a stored checkpoint, or the ``plan`` (arguments of
    :class:`HiggsQuantConfig`) by which an unquantized one is quantized. Exactly one is given."""

    def __init__(self, layers: dict[str, LayerConfig] | None = None, plan: dict[str, Any] | None = None) -> None:
        super().__init__()
        if layers is None and plan is None:  # what vLLM makes of `quantization="higgs_quant"` alone
            raise ValueError(
                "this checkpoint is not quantized, and nothing says how to quantize it; give the arguments of "
                'HiggsQuantConfig: hf_overrides={"quantization_config": {"quant_method": "higgs_quant", "bits": 4}}'
            )
        self.layers, self.plan = layers or {}, plan
        self.found: set[str] = set()
        self.model_type = ""
        if plan is not None:
            self.grid = grid_of_all(plan["bits"], plan["grid"], plan["allocation"])

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HiggsVllmConfig:
        """Raises FormatError for a stored checkpoint of another version or form; for arguments see HiggsQuantConfig."""
        if "layers" in config or "format_version" in config:
            layers = StoredConfig.from_dict(config).layers
            if embedding := next(filter(_EMBEDDING.search, layers), None):
                raise UnsupportedError(f"{embedding}: quantized embeddings are not supported in vLLM")
            return cls(layers)
        arguments = HiggsQuantConfig(**config)
        if arguments.scales != "none":
            raise UnsupportedError(
                f"scales={arguments.scales!r} needs the whole model, which vLLM does not have while it loads; "
                "use 'none', or quantize with `higgs quantize` and serve the result"
            )
        unknown = [key for key, value in arguments.plan.items() if value and key not in _PLAN]
        if unknown:
            raise UnsupportedError(f"{', '.join(unknown)} cannot be used while vLLM loads; use {', '.join(_PLAN)}")
        return cls(plan=arguments.plan)

    @classmethod
    def from_config_dict_json(cls, text: str) -> HiggsVllmConfig:
        return cls.from_config(json.loads(text))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """What vLLM tells of the model before it builds it."""
        self.model_type = "" if hf_config is None else hf_config.get_text_config().model_type

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, mapper: Any) -> None:
        """Layers go by the names of the checkpoint until the model says how vLLM calls them."""
        self.layers = mapper.apply_dict(self.layers)
        if self.plan is not None and self.plan["allocation"] is not None:
            self.plan = {**self.plan, "allocation": mapper.apply_dict(self.plan["allocation"])}

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        parent, dot, leaf = prefix.removeprefix(".").rpartition(".")  # vLLM's GPT-2 has a head called ".lm_head"
        names = [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(leaf, [leaf])]
        self.found.update(names)
        configs = {name: config for name in names if (config := self._config_of(name, layer)) is not None}
        if not configs:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if len(configs) < len(names):
            left = ", ".join(name for name in names if name not in configs)
            raise UnsupportedError(
                f"{', '.join(configs)} is quantized and {left} is not, but vLLM fuses them to {prefix}; "
                "quantize all or none of them"
            )
        return HiggsLinearMethod(self, configs)

    def check_all_found(self) -> None:
        """Raises FormatError if a layer that should be quantized is none of the model's; each pipeline stage has but
        its own."""
        missing = sorted(set(self._named()) - self.found)
        if missing and get_pp_group().world_size == 1:
            raise FormatError(f"quantization_config names {missing[0]} ({len(missing)} such), which vLLM does not have")

    def _named(self) -> dict[str, Any]:
        """Layers that are named one by one."""
        return self.layers if self.plan is None else self.plan["allocation"] or {}

    def _experts_method(self, layer: Any, prefix: str) -> HiggsExpertsMethod | None:
        moe = layer.moe_config
        columns = {
            "gate_up": (moe.hidden_dim, moe.hidden_dim),
            "down": (moe.intermediate_size_per_partition, moe.intermediate_size),
        }
        names = {projection: f"{prefix}.{projection}" for projection in columns}
        self.found.update(names.values())
        configs, skipped = {}, {}
        for projection, name in names.items():
            config = self.layers.get(name)
            if self.plan is not None and (grid := self._planned_grid(name)) is not None:
                config = self._planned(name, grid, *columns[projection], seed_name=self._in_transformers(name))
                if config is None:
                    skipped[name] = "its columns are not a multiple of 64"
                else:
                    config = replace(config, experts=moe.num_logical_experts)
            if config is not None:
                configs[name] = config
        for name in require_pairs(names.values(), configs, skipped):
            logger.warning(f"layer {name} is not quantized: {skipped[name]}")
            del configs[name]
        return HiggsExpertsMethod(self, layer, configs) if configs else None

    def _in_transformers(self, name: str) -> str:
        """What transformers calls a layer of this name in a checkpoint: seeds hang on it."""
        for conversion in get_checkpoint_conversion_mapping(self.model_type) or []:
            if isinstance(conversion, WeightRenaming):
                name, _ = conversion.rename_source_key(name)
        return name

    def _config_of(self, name: str, layer: Any) -> LayerConfig | None:
        """How the layer of this name is quantized; None if it is not."""
        if self.plan is None:
            return self.layers.get(name)
        named = self.plan["allocation"] is not None
        grid = None if isinstance(layer, ParallelLMHead) and not named else self._planned_grid(name)
        if grid is None:
            return None
        return self._planned(name, grid, getattr(layer, "input_size_per_partition", layer.input_size), layer.input_size)

    def _planned_grid(self, name: str) -> str | None:
        plan = self.plan
        assert plan is not None
        if plan["allocation"] is not None:
            return plan["allocation"].get(name)
        left_alone = ROUTER.search(name) or any(re.search(pattern, name) for pattern in plan["skip"])
        return None if left_alone else self.grid

    def _planned(self, name: str, grid: str, k: int, whole: int, seed_name: str | None = None) -> LayerConfig | None:
        """Of a layer of which each rank has ``k`` of the ``whole`` columns, with blocks and groups that fit those: the
        ones of the whole layer may not. None if there are none."""
        plan = self.plan
        assert plan is not None
        if k % 64 != 0:
            reason = f"layer {name} is not quantized: in_features = {k} on each rank is not a multiple of 64"
            if plan["strict"]:
                raise UnsupportedError(reason)
            logger.warning(reason)
            return None
        block = plan["block"] or _core.default_block(k)
        group = plan["group"] or _core.default_group(k, block)
        if k % group != 0 and k != whole:
            group = block
        name = seed_name or name
        return LayerConfig(grid, block, group, layer_seeds(plan["seed"], [name])[name])
