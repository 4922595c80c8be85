"""Experts of a mixture in the loader of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .._formats import LayerFormat
from ..checkpoint.layers import module_keys
from ..config import QuantizationConfig
from ..embedding import quantized_class
from ..errors import FormatError
from ..linear import as_linear
from ..moe import PROJECTIONS, HiggsExperts, is_experts
from . import tensor_parallel
from .layers import check_shapes, is_distributed, replace_layer


def name_in_file(model: Any, layer: str) -> str:
    """What ``save_pretrained`` calls ``layer``: transformers renames some modules on the way."""
    from transformers.core_model_loading import revert_weight_conversion

    keys = [*revert_weight_conversion(model, {f"{layer}.indices": torch.empty(0)})]
    return keys[0].removesuffix(".indices") if len(keys) == 1 else layer


def place_layer(model: nn.Module, name: str, formats: Mapping[str, LayerFormat]) -> None:
    """Puts a module without memory in the place of layer ``name``; with one projection of experts comes the other."""
    parent = name.rpartition(".")[0]
    place: Any = model.get_submodule(parent)
    if isinstance(place, HiggsExperts):
        return
    if is_experts(place):
        pair = {layer: formats[f"{parent}.{layer}"] for layer in PROJECTIONS.values()}
        model.set_submodule(parent, HiggsExperts.without_weights(place, pair))
        return
    original: Any = model.get_submodule(name)
    module = quantized_class(original)(formats[name], device="meta")
    module.bias = as_linear(original).bias
    replace_layer(model, name, original, module)


def place_experts(model: Any, config: QuantizationConfig, stored: dict[str, tuple[int, ...]] | None) -> None:
    """Builds :class:`HiggsExperts` without memory for the experts that ``config`` names.

    Raises FormatError if the model has none of that name, or of other shapes; UnsupportedError for a parallel model
    whose plan does not fit.
    """
    pairs: dict[str, dict[str, str]] = {}  # module: {projection: layer}
    for name, layer in config.layers.items():
        if layer.experts is not None:
            parent, _, projection = name.rpartition(".")
            pairs.setdefault(parent, {})[projection] = name
    # The config goes by the names in the file, which differ from the modules' where transformers renames.
    weights = {f"{parent}.down_proj": parent for parent in pairs}
    keys = module_keys(model, weights)
    modules = {parent: keys.get(weight, weight).removesuffix(".down_proj") for weight, parent in weights.items()}
    for parent, layers in pairs.items():
        try:
            experts: Any = model.get_submodule(modules[parent])
        except AttributeError as e:
            raise FormatError(f"quantization_config names the experts {parent}, which the model does not have") from e
        if not is_experts(experts) or layers.keys() != set(PROJECTIONS.values()):
            raise FormatError(
                f"quantization_config has {', '.join(layers.values())}; {parent} is a {type(experts).__name__}, "
                f"expected experts with both of {' and '.join(PROJECTIONS.values())}"
            )
        formats, scaled = {}, {}
        for parameter, projection in PROJECTIONS.items():
            name, weight = layers[projection], getattr(experts, parameter)
            layer, (count, n, k) = config.layers[name], weight.shape
            if layer.experts != count:
                raise FormatError(f"quantization_config of {name} says {layer.experts} experts, there are {count}")
            formats[projection] = layer.format(name, count * n, k)
            scaled[projection] = layer.column_scale
        module = HiggsExperts.without_weights(experts, formats, scaled)
        for projection, name in layers.items():
            check_shapes(name, getattr(module, projection), stored)
            if is_distributed(model):
                tensor_parallel.before_loading(name, getattr(module, projection))
        if is_distributed(model):
            tensor_parallel.plan_experts(model, modules[parent], module)
        model.set_submodule(modules[parent], module)
