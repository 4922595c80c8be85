"""LoRA (PEFT) on :class:`HiggsLinear`: adapters train on top of constant quantized weights.

Imported by ``import higgs`` as soon as ``peft.tuners.lora.model`` is there. PEFT keeps no registry of layer types, so
three of its functions are wrapped: the last dispatcher, the search for what "all-linear" means (which would leave out
the quantized layers without a word) and ``prepare_model_for_kbit_training``. ``LoraConfig`` and
``PeftModel.from_pretrained`` then work as ever.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any, cast

import peft
from peft import utils
from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

from ..errors import UnsupportedError
from ..linear import HiggsLinear

# Of LoraConfig: initializations that do not look at the weight.
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")


class LoraHiggsLinear(Linear):
    """x @ W^^T + bias + scaling B A x. The weights are on a grid, so nothing can be merged into them."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if config.use_dora:
            raise UnsupportedError("use_dora=True needs the weight of the layer; LoRA on HiggsLinear is without DoRA")
        if config.init_lora_weights not in _INITIALIZATIONS:
            raise UnsupportedError(
                f"init_lora_weights={config.init_lora_weights!r} is not supported on HiggsLinear; "
                f"use one of {', '.join(map(repr, _INITIALIZATIONS))}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        base_layer = cast(nn.Module, self.base_layer)  # PEFT looks for the device of a weight, which it has not
        self._move_adapter_to_device_of_base_layer(adapter_name, next(base_layer.parameters()).device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UnsupportedError(
            "an adapter cannot be merged into quantized weights; call higgs.dequantize_ on the model first, "
            "load the adapter on that and merge"
        )


def _dispatch(target: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    adapted = isinstance(target, tuners_utils.BaseTunerLayer)  # by an adapter before this one
    if type(target.base_layer if adapted else target) is HiggsLinear:  # not the experts of a mixture
        return LoraHiggsLinear(target, adapter_name, config=config, **kwargs)
    return _dispatch_others(target, adapter_name, config=config, **kwargs)


def _include_all_linear(config: Any, model: nn.Module) -> Any:
    targets = getattr(config, "target_modules", None)
    config = _include_all_others(config, model)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if get_head is not None else None
        config.target_modules |= {
            name
            for name, module in model.named_modules()
            if type(module) is HiggsLinear and module is not head and not name.endswith(".base_layer")
        }
    return config


def _prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
    """``prepare_model_for_kbit_training``, which casts every float16 parameter to float32 (scales must not be) and
    switches gradient checkpointing on only for kinds of quantization that it knows, as bitsandbytes' 4 bits."""
    layers = [module for module in model.modules() if isinstance(module, HiggsLinear)]
    packed = [p for layer in layers for p in (layer.scales, layer.column_scale) if p is not None]
    data = [p.data for p in packed]
    if layers:
        model.is_loaded_in_4bit = True
    try:
        return _prepare_others(model, *args, **kwargs)
    finally:
        if layers:
            del model.is_loaded_in_4bit
        for parameter, constant in zip(packed, data, strict=True):
            parameter.data = constant


_dispatch_others = lora_model.dispatch_default
_include_all_others = tuners_utils._maybe_include_all_linear_layers
_prepare_others = utils.other.prepare_model_for_kbit_training
for _module in (utils.other, utils, peft):  # one imports it from the other, maybe later
    if hasattr(_module, "prepare_model_for_kbit_training"):
        _module.prepare_model_for_kbit_training = functools.wraps(_prepare_others)(_prepare)  # type: ignore[attr-defined]
if "config" in inspect.signature(_dispatch_others).parameters:  # an older PEFT refuses HiggsLinear by itself
    lora_model.dispatch_default = _dispatch  # type: ignore[assignment]
    tuners_utils._maybe_include_all_linear_layers = _include_all_linear  # type: ignore[assignment]
