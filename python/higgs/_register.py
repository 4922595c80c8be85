"""Registers higgs with transformers (the ``higgs_quant`` quantizer, the attention ``higgs_sdpa``) and PEFT (LoRA on
HiggsLinear), without importing them.

If the library is loaded, at once; else when it loads the module that higgs plugs into.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial

from higgs_autoload import when_loaded

# module: what it has once it is loaded, and what registers with it when imported
_INTEGRATIONS = {
    "transformers.quantizers": ("register_quantizer", ".integrations.transformers"),
    "transformers.modeling_utils": ("AttentionInterface", ".integrations.attention"),
    "peft.tuners.lora.model": ("LoraModel", ".integrations.peft"),
}


def register() -> None:
    for target, (content, integration) in _INTEGRATIONS.items():
        module = sys.modules.get(target)
        if module is None:
            when_loaded(target, partial(importlib.import_module, integration, __package__))
        elif hasattr(module, content):  # else it is importing us
            importlib.import_module(integration, __package__)
