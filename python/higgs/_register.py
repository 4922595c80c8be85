"""Registers higgs with transformers (the ``higgs_quant`` quantizer) and PEFT (LoRA on HiggsLinear), without importing
them.

If the library is loaded, at once; else when it loads the module that higgs plugs into.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys

_INTEGRATIONS = {
    "transformers.quantizers": ".integrations.transformers",  # registers when imported
    "peft.tuners.lora.model": ".integrations.peft",
}


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, target: str) -> None:
        self.target = target

    def find_spec(self, name, path=None, target=None):
        if name != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            _integrate(name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _integrate(target: str) -> None:
    importlib.import_module(_INTEGRATIONS[target], __package__)


def register() -> None:
    for target in _INTEGRATIONS:
        module = sys.modules.get(target)
        if module is None:
            sys.meta_path.insert(0, _Finder(target))
        elif not getattr(module.__spec__, "_initializing", False):
            _integrate(target)
