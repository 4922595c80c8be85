"""Registers higgs with transformers (the ``higgs_quant`` quantizer) and PEFT (LoRA on HiggsLinear), without importing
them.

If the library is loaded, at once; else when it loads the module that higgs plugs into.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial

from higgs_autoload import when_loaded

_INTEGRATIONS = {
    "transformers.quantizers": ".integrations.transformers",  # registers when imported
    "peft.tuners.lora.model": ".integrations.peft",
}


def _integrate(target: str) -> None:
    importlib.import_module(_INTEGRATIONS[target], __package__)


def register() -> None:
    for target in _INTEGRATIONS:
        module = sys.modules.get(target)
        if module is None:
            when_loaded(target, partial(_integrate, target))
        elif not getattr(module.__spec__, "_initializing", False):
            _integrate(target)
