"""LoRA (PEFT) on :class:`HiggsLinear`: adapters train on top of constant quantized weights.

Imported by ``import higgs`` as soon as ``peft.tuners.lora.model`` is there. PEFT keeps no registry of layer types, so its
last dispatcher is wrapped; ``LoraConfig`` and ``PeftModel.from_pretrained`` then work as ever.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.lora import model as lora_model
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
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
        self._move_adapter_to_device_of_base_layer(adapter_name, next(self.get_base_layer().parameters()).device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UnsupportedError(
            "an adapter cannot be merged into quantized weights; call higgs.dequantize_ on the model first, "
            "load the adapter on that and merge"
        )


def _dispatch(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, HiggsLinear):
        return LoraHiggsLinear(target, adapter_name, config=config, **kwargs)
    return _dispatch_others(target, adapter_name, config=config, **kwargs)


_dispatch_others = lora_model.dispatch_default
lora_model.dispatch_default = _dispatch
