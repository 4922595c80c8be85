"""Quantized layers in a model of transformers that is being loaded."""

from __future__ import annotations

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
