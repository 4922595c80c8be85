"""higgs: data-free LLM quantization on MSE-optimal Gaussian grids (HIGGS, arXiv 2411.17525).

>>> import higgs
>>> report = higgs.quantize_(model, bits=4)
>>> model.save_pretrained("quantized")  # AutoModelForCausalLM.from_pretrained("quantized") after `import higgs`
"""

from . import _core, _register
from ._ops import LayerFormat, layer_format
from .allocate import Allocation, grid_menu, plan_allocation
from .energies import Energies, gather_energies
from .errors import CudaError, FormatError, HiggsError, UnsupportedError
from .linear import HiggsLinear, linear_shared
from .model import dequantize_, quantize_
from .report import LayerReport, Report
from .sensitivity import LayerSensitivity, Sensitivities

__version__: str = _core.version
grids = _core.grids
find_grid = _core.find_grid
grid_for_bits = _core.grid_for_bits

_register.register()

__all__ = [
    "Allocation",
    "CudaError",
    "Energies",
    "FormatError",
    "HiggsError",
    "HiggsLinear",
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
]
