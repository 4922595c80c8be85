"""Quantized layers in a model of transformers that is being loaded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from torch import nn

from ..errors import FormatError
from ..linear import HiggsLinear


def replace_layer(model: nn.Module, name: str, original: nn.Module, module: HiggsLinear) -> None:
    """Puts ``module`` in the place of ``original``."""
    model.set_submodule(name, module.stand_for(original))
    if module.is_conv1d:  # what holds one draws ``c_proj.weight`` anew, unless it counts as initialized
        cast(Any, model.get_submodule(name.rpartition(".")[0]))._is_hf_initialized = True


def is_distributed(model: Any) -> bool:
    """Whether ``model`` is loaded with ``distributed_config`` or ``tp_plan``."""
    return getattr(model.config, "distributed_config", None) is not None


def check_listed(layers: Collection[str], stored: dict[str, tuple[int, ...]] | None) -> None:
    """``layers`` of the quantization_config are all quantized layers of the file: transformers would draw the weights
    of others at random."""
    if not layers:
        raise FormatError("quantization_config lists no layers")
    tensors = stored or {}
    for tensor in tensors:
        name = tensor.removesuffix(".indices")
        if f"{name}.indices" == tensor and f"{name}.scales" in tensors and name not in layers:
            raise FormatError(f"the checkpoint has a tensor {tensor}, but its quantization_config no layer {name}")


def check_shapes(name: str, module: HiggsLinear, stored: dict[str, tuple[int, ...]] | None) -> None:
    """The tensors of ``module`` have these shapes in the file, where they are known."""
    if stored is None:
        return
    for part, parameter in module.named_parameters():
        tensor, expected = f"{name}.{part}", list(parameter.shape)
        if tensor not in stored:
            raise FormatError(f"the checkpoint has no tensor {tensor}, which its quantization_config promises")
        if list(stored[tensor]) != expected:
            raise FormatError(
                f"tensor {tensor} has shape {list(stored[tensor])}, its quantization_config says {expected}"
            )
