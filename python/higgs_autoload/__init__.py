"""Entry point ``torch.backends``, which ``import torch`` calls: makes transformers know quantized checkpoints of higgs
without ``import higgs``.

A package of its own, because higgs imports torch. It only waits for transformers and never raises: an exception here
would be one of ``import torch``. ``HIGGS_AUTOLOAD=0`` switches it off, ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` all such.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable

# The second, which the first imports, for when torch is imported by the first. Every model needs both.
_TARGETS = ("transformers.modeling_utils", "transformers.quantizers")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, target: str, action: Callable[[], object]) -> None:
        self.target, self.action = target, action

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
            self.action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_loaded(target: str, action: Callable[[], object]) -> None:
    """Calls ``action`` once, as soon as the module ``target``, which is not loaded yet, has been."""
    sys.meta_path.insert(0, _Finder(target, action))


def _register() -> None:
    try:
        import higgs.integrations.transformers  # noqa: F401 (registers when imported)
    except Exception as e:
        warnings.warn(f"higgs is not registered with transformers: {e!r}", stacklevel=2)


def hook() -> None:
    """What the entry point names. Does nothing where higgs is being imported: then it registers by itself."""
    if os.environ.get("HIGGS_AUTOLOAD", "1") == "0" or "higgs" in sys.modules:
        return
    for target in _TARGETS:
        if target not in sys.modules:
            when_loaded(target, _register)
            return
