"""Registers the ``higgs_quant`` quantizer with transformers, without importing transformers.

If transformers is loaded, at once; else when it loads ``transformers.quantizers`` (which its model loader needs).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

_TARGET = "transformers.quantizers"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            from .integrations import transformers  # noqa: F401 (registers when imported)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    module = sys.modules.get(_TARGET)
    if module is None:
        sys.meta_path.insert(0, _Finder())
    elif not getattr(module.__spec__, "_initializing", False):
        from .integrations import transformers  # noqa: F401
