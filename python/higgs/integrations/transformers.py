"""Quantized checkpoints in transformers (5.x): ``AutoModelForCausalLM.from_pretrained`` and ``save_pretrained``.

Imported by ``import higgs`` as soon as transformers is there. Nothing of transformers but ``quantizers`` and the config
base may be imported at module level: the import can happen while transformers itself is being imported.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import _core
from ..checkpoint.layers import module_keys
from ..config import QUANT_METHOD, QuantizationConfig
from ..errors import FormatError, UnsupportedError
from ..linear import HiggsLinear


@register_quantization_config(QUANT_METHOD)
class HiggsQuantConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint as transformers sees it; see FORMAT.md for the keys."""

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        format_version: int = _core.format_version,
        quant_method: str = QUANT_METHOD,
        **_: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # the registry takes plain names
        self.format_version = format_version
        self.layers = layers or {}
        self.parsed()  # raises FormatError

    def parsed(self) -> QuantizationConfig:
        return QuantizationConfig.from_dict(self.__dict__)


@register_quantizer(QUANT_METHOD)
class HiggsHfQuantizer(HfQuantizer):
    """Builds HiggsLinear modules before the weights are loaded."""

    requires_calibration = False
    quantization_config: HiggsQuantConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise UnsupportedError(
                "quantizing while loading is not supported; load the model and call higgs.quantize_(model, bits=4), "
                "or use `higgs quantize`"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config.parsed()
        stored = _stored_shapes(checkpoint_files)
        # The config goes by the names in the file, which differ from the modules' where transformers renames.
        keys = module_keys(model, [f"{name}.weight" for name in config.layers])
        for name, layer in config.layers.items():
            module_name = keys.get(f"{name}.weight", name).removesuffix(".weight")
            try:
                linear = model.get_submodule(module_name)
            except AttributeError as e:
                raise FormatError(f"quantization_config names layer {name}, which the model does not have") from e
            if not isinstance(linear, nn.Linear):
                raise FormatError(f"quantization_config names layer {name}, which is a {type(linear).__name__}")
            fmt = layer.format(name, linear.out_features, linear.in_features)
            module = HiggsLinear(
                fmt,
                bias=linear.bias is not None,
                column_scale=layer.column_scale,
                dtype=linear.weight.dtype,
                device="meta",
            )
            for tensor, parameter in module.named_parameters():
                if stored is not None:
                    _check_shape(f"{name}.{tensor}", tuple(parameter.shape), stored)
            model.set_submodule(module_name, module.train(linear.training))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, HiggsLinear) and not module.stored()[0].is_meta:  # meta: offloaded
                _check_scales(name, module)
                module.tile_()
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from ..model import dequantize_

        return dequantize_(model, dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _stored_shapes(files: list[str] | None) -> dict[str, tuple[int, ...]] | None:
    """Shapes in the safetensors headers: transformers does not compare shapes when a quantizer is active."""
    if not files or not all(str(f).endswith(".safetensors") for f in files):
        return None
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as f:
            for key in f.keys():  # noqa: SIM118 (no mapping)
                shapes[key] = tuple(f.get_slice(key).get_shape())
    return shapes


def _check_shape(name: str, expected: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> None:
    if name not in stored:
        raise FormatError(f"the checkpoint has no tensor {name}, which its quantization_config promises")
    if stored[name] != expected:
        raise FormatError(
            f"tensor {name} has shape {list(stored[name])}, its quantization_config says {list(expected)}"
        )


def _check_scales(name: str, module: HiggsLinear) -> None:
    _, scales = module.stored()
    if not (scales.isfinite() & (scales >= 0)).all():
        raise FormatError(f"tensor {name}.scales holds NaN, inf or negative values")
    scale: Tensor | None = module.column_scale
    if scale is not None and not (scale.isfinite() & (scale > 0)).all():
        raise FormatError(f"tensor {name}.column_scale holds values that are not positive and finite")


def attach(model: Any, config: QuantizationConfig) -> None:
    """Makes ``save_pretrained`` write a quantized checkpoint."""
    hf_config = HiggsQuantConfig(**config.to_dict())
    model.config.quantization_config = hf_config
    model.hf_quantizer = HiggsHfQuantizer(hf_config, pre_quantized=True)
    model.is_quantized = True


def detach(model: Any) -> None:
    """The model is an ordinary one again."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
