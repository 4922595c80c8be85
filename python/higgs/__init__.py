"""higgs: data-free LLM quantization on MSE-optimal Gaussian grids (HIGGS, arXiv 2411.17525).

>>> import higgs
>>> report = higgs.quantize_(model, bits=4)
>>> model.save_pretrained("quantized")  # AutoModelForCausalLM.from_pretrained("quantized") after `import higgs`
"""

from typing import Any

from . import _core, _register
from ._ops import LayerFormat, layer_format
from .allocate import Allocation, grid_menu, plan_allocation
from .energies import Energies, gather_energies
from .errors import CudaError, FormatError, HiggsError, UnsupportedError
from .linear import HiggsLinear, linear_shared
from .model import dequantize_, quantize_
from .report import LayerReport, Report
from .sensitivity import LayerSensitivity, Sensitivities
from .shared_inputs import share_inputs_

__version__: str = _core.version
grids = _core.grids
find_grid = _core.find_grid
grid_for_bits = _core.grid_for_bits

_register.register()


def __getattr__(name: str) -> Any:
    if name == "HiggsQuantConfig":  # needs transformers, which the rest of higgs does not
        from .integrations.transformers import HiggsQuantConfig

        return HiggsQuantConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Allocation",
    "CudaError",
    "Energies",
    "FormatError",
    "HiggsError",
    "HiggsLinear",
    "HiggsQuantConfig",
    "LayerFormat",
    "LayerReport",
    "LayerSensitivity",
    "Report",
    "Sensitivities",
    "UnsupportedError",
    "dequantize_",
    "find_grid",
    "gather_energies",
    "grid_for_bits",
    "grid_menu",
    "grids",
    "layer_format",
    "linear_shared",
    "plan_allocation",
    "quantize_",
    "share_inputs_",
]
