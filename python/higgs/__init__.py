"""higgs: data-free LLM quantization on MSE-optimal Gaussian grids (HIGGS, arXiv 2411.17525)."""

from . import _core
from ._ops import LayerFormat, layer_format
from .errors import CudaError, FormatError, HiggsError, UnsupportedError
from .linear import HiggsLinear

__version__: str = _core.version
grids = _core.grids
find_grid = _core.find_grid
grid_for_bits = _core.grid_for_bits

__all__ = [
    "CudaError",
    "FormatError",
    "HiggsError",
    "HiggsLinear",
    "LayerFormat",
    "UnsupportedError",
    "find_grid",
    "grid_for_bits",
    "grids",
    "layer_format",
]
