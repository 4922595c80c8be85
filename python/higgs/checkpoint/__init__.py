"""Checkpoints on disk: reading, quantizing tensor by tensor, inspecting."""

from .files import Checkpoint, ShardWriter, TensorEntry, TensorSpec
from .inspect import Inspection, LayerInfo, inspect_checkpoint, stored_format
from .layers import LinearWeights, find_linear_weights, module_keys
from .quantize import describe_energies, quantize_checkpoint

__all__ = [
    "Checkpoint",
    "Inspection",
    "LayerInfo",
    "LinearWeights",
    "ShardWriter",
    "TensorEntry",
    "TensorSpec",
    "describe_energies",
    "find_linear_weights",
    "inspect_checkpoint",
    "module_keys",
    "quantize_checkpoint",
    "stored_format",
]
