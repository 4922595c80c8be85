"""Transformers (5.x): ``AutoModelForCausalLM.from_pretrained`` of quantized checkpoints and, with a
:class:`HiggsQuantConfig`, of ordinary ones that are quantized on the way in; ``save_pretrained``.

Imported by ``import higgs`` as soon as transformers is there. Nothing of transformers but ``quantizers`` and the config
base may be imported at module level: the import can happen while transformers itself is being imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import _core
from .._ops import LayerFormat, quantize
from ..checkpoint.layers import layer_name, module_keys
from ..config import QUANT_METHOD, QuantizationConfig, guard_tensor, guarded
from ..embedding import input_embedding, quantized_class
from ..errors import FormatError, UnsupportedError
from ..linear import HiggsLinear, as_linear, constant
from ..model import (
    grid_of_all,
    plan_formats,
    quantization_config,
    quantize_,
    quantized_layer,
    tied_head,
    unquantized_layers,
)
from ..moe import layer_of, place_layers
from ..patterns import compiled
from ..shared_inputs import share_inputs_
from . import tensor_parallel
from .layers import check_listed, check_shapes, is_distributed, replace_layer
from .moe import name_in_file, place_experts, place_layer

logger = logging.get_logger(__name__)


@register_quantization_config(QUANT_METHOD)
class HiggsQuantConfig(QuantizationConfigMixin):
    """``quantization_config`` as transformers sees it, in two uses.

    To quantize while loading: ``from_pretrained(path, quantization_config=HiggsQuantConfig(bits=4))``. Exactly one of
    ``bits``, ``grid`` and ``allocation``, and ``lm_head_grid``, ``embedding_grid``, ``scales``, ``skip``, ``block``,
    ``group``, ``seed`` and ``strict`` as in :func:`higgs.quantize_`, whose result on the loaded model this is, bit for
    bit. With ``scales`` "none", the default here, every weight is quantized as it is read, so that memory holds one
    unquantized layer at a time. Column scales ("self" or "random": better, above all for small models) come from
    running the model, which is loaded whole first.

    In a checkpoint: ``layers``, ``format_version`` and ``quant_method`` (FORMAT.md). They win over the above.

    Raises ValueError or TypeError for arguments that do not go together or do not exist, FormatError for a malformed
    checkpoint.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        format_version: int = _core.format_version,
        quant_method: str = QUANT_METHOD,
        *,
        bits: float | None = None,
        grid: str | None = None,
        allocation: Mapping[str, str] | None = None,
        lm_head_grid: str | None = None,
        embedding_grid: str | None = None,
        scales: str = "none",
        skip: Iterable[str] = (),
        block: int | None = None,
        group: int | None = None,
        seed: int = 0,
        strict: bool = False,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # the registry takes plain names
        self.format_version = format_version
        self.layers = {} if layers is None else layers
        self.parsed()  # raises FormatError
        if unknown and layers is None:  # a checkpoint may hold keys of later versions
            raise TypeError(f"HiggsQuantConfig does not take {', '.join(unknown)}")
        if scales not in ("none", "random", "self"):
            raise ValueError(f"scales {scales!r} is not supported; use 'none', 'self' or 'random'")
        self.scales = scales
        self.plan: dict[str, Any] = {
            "bits": bits, "grid": grid, "allocation": None if allocation is None else dict(allocation),
            "lm_head_grid": lm_head_grid, "embedding_grid": embedding_grid,
            "skip": [p.pattern for p in compiled("skip", skip)], "block": block, "group": group, "seed": seed,
            "strict": strict,
        }  # fmt: skip
        if layers is None and any(option is not None for option in (bits, grid, allocation)):
            grid_of_all(bits, grid, allocation, lm_head_grid, embedding_grid)

    def parsed(self) -> QuantizationConfig:
        return QuantizationConfig.from_dict(self.__dict__)

    def to_dict(self) -> dict[str, Any]:
        """As in config.json: what a checkpoint holds if there are ``layers``, else the arguments."""
        if self.layers:
            return self.parsed().to_dict()
        return {"quant_method": self.quant_method, "scales": self.scales, **self.plan}


class _Quantize:
    """The loader's operation on a weight of a planned layer; a ``ConversionOps`` in all but inheritance, the import of
    which would be circular here."""

    def __init__(self, formats: dict[str, LayerFormat], failures: dict[str, ValueError]) -> None:
        self.formats, self.failures = formats, failures

    def convert(
        self, tensors: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Any]:
        """Puts a module without memory in the place of each; what is returned the loader puts into it. Errors, which
        the loader would swallow, are raised when it is done."""
        result = {}
        for key, tensor in tensors.items():
            name, weight = layer_of(key), tensor[0] if isinstance(tensor, list) else tensor
            if name is None or name not in self.formats:
                result[key] = weight
                continue
            if missing_keys is not None:
                missing_keys.discard(key)
            place_layer(model, name, self.formats)
            conv1d = cast(HiggsLinear, model.get_submodule(name)).is_conv1d
            try:
                indices, scales, _t2 = quantize(weight.T if conv1d else weight.flatten(0, -2), self.formats[name])
            except ValueError as e:
                self.failures[name] = e
                continue
            result[f"{name}.indices"], result[f"{name}.scales"] = constant(indices), constant(scales)
        return result


@register_quantizer(QUANT_METHOD)
class HiggsHfQuantizer(HfQuantizer):
    """Stored checkpoints: builds HiggsLinear modules before the weights are loaded. Others: quantizes the weights as
    they are loaded."""

    requires_calibration = False
    quantization_config: HiggsQuantConfig

    def __init__(self, quantization_config: HiggsQuantConfig, **kwargs: Any) -> None:
        from . import attention  # noqa: F401 (registers; `import higgs` could not while modeling_utils was importing it)

        super().__init__(quantization_config, **kwargs)
        self.formats: dict[str, LayerFormat] = {}  # of the layers to quantize while loading
        self.later: dict[str, LayerFormat] = {}  # of those to quantize then: an embedding to which the head is tied
        self.failures: dict[str, ValueError] = {}  # of those that could not be

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            plan = self.quantization_config.plan
            grid_of_all(plan["bits"], plan["grid"], plan["allocation"])

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self._plan(model)
            return
        config = self.quantization_config.parsed()
        if is_distributed(model):
            tensor_parallel.refuse_unsupported(cast(Any, model).config.distributed_config)
        stored = _stored_shapes(checkpoint_files)
        # The config goes by the names in the file, which differ from the modules' where transformers renames.
        keys = module_keys(model, [f"{name}.weight" for name in config.layers])
        place_experts(model, config, stored)
        for name, layer in config.layers.items():
            if layer.experts is not None:
                continue
            module_name = keys.get(f"{name}.weight", name).removesuffix(".weight")
            try:
                original = model.get_submodule(module_name)
            except AttributeError as e:
                raise FormatError(f"quantization_config names layer {name}, which the model does not have") from e
            linear = as_linear(original)
            if not isinstance(linear, nn.Linear):
                raise FormatError(f"quantization_config names layer {name}, which is a {type(original).__name__}")
            fmt = layer.format(name, linear.out_features, linear.in_features)
            module = quantized_class(original)(
                fmt,
                bias=linear.bias is not None,
                column_scale=layer.column_scale,
                dtype=linear.weight.dtype,
                device="meta",
            )
            check_shapes(name, module, stored)
            unexpected = {rf"^{re.escape(module_name)}\.weight$"}  # it may be the guard
            cast(Any, model)._keys_to_ignore_on_load_unexpected |= unexpected
            if is_distributed(model):
                tensor_parallel.before_loading(name, module)
            replace_layer(model, module_name, original, module)
        check_listed(config.layers, stored)

    def _plan(self, model: nn.Module) -> None:
        if is_distributed(model):
            raise UnsupportedError(
                "quantizing while loading is not supported with distributed_config or tp_plan: "
                "save the quantized model, then load that"
            )
        formats, skipped = plan_formats(model, **self.quantization_config.plan)
        for name, reason in skipped.items():
            logger.warning(f"layer {name} is not quantized: {reason}")
        if self.quantization_config.scales == "none":
            embedding = input_embedding(model)
            if embedding in formats and tied_head(model) is not None:
                self.later = {embedding: formats.pop(embedding)}
            self.formats = formats

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return layer_of(param_name) in self.formats

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes, for ``device_map="auto"``."""
        if self.param_needs_quantization(model, param_name):
            return self.formats[cast(str, layer_of(param_name))].bits() / 8
        return param.element_size()

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self.formats, self.failures)

    def _quantize_rest(self, model: nn.Module) -> None:
        """What has no weight of its own in the checkpoint (a tied head) or lends it, and everything if there are column
        scales."""
        config = self.quantization_config
        if config.scales != "none":
            quantize_(model, **config.plan, scales=config.scales)
            return
        for name, e in self.failures.items():
            raise ValueError(f"layer {name}: {e}") from e
        layers, formats = unquantized_layers(model), {**self.formats, **self.later}
        rest = {n: quantized_layer(n, layers[n], fmt)[0] for n, fmt in formats.items() if n in layers}
        place_layers(model, rest)
        attach(model, quantization_config(model))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            self._quantize_rest(model)
        for name, module in model.named_modules():
            if isinstance(module, HiggsLinear) and is_distributed(model):
                tensor_parallel.after_loading(name, module)
            if isinstance(module, HiggsLinear) and not module.stored()[0].is_meta:  # meta: offloaded
                check_scales(name, module)
                module.tile_()
        share_inputs_(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: the tensors and the guard."""
        tensors, head = model.state_dict(), model.get_output_embeddings()
        guard = guarded(name for name, m in model.named_modules() if type(m) is HiggsLinear and m is not head)
        if guard is not None:
            tensors[guard] = guard_tensor()
        return tensors, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        from ..model import dequantize_

        # The config of a model that was saved says it in a word.
        return dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """For adapters: the quantized weights are constants, gradients go through them to the input."""
        return True

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


def check_scales(name: str, module: HiggsLinear) -> None:
    _, scales = module.stored()
    if not (scales.isfinite() & (scales >= 0)).all():
        raise FormatError(f"tensor {name}.scales holds NaN, inf or negative values")
    scale: Tensor | None = module.column_scale
    if scale is not None and not (scale.isfinite() & (scale > 0)).all():
        raise FormatError(f"tensor {name}.column_scale holds values that are not positive and finite")


def attach(model: Any, config: QuantizationConfig) -> None:
    """Makes ``save_pretrained`` write a quantized checkpoint."""
    config = QuantizationConfig({name_in_file(model, name): layer for name, layer in config.layers.items()})
    hf_config = HiggsQuantConfig(**config.to_dict())
    model.config.quantization_config = hf_config
    if isinstance(model.get_output_embeddings(), HiggsLinear):
        _untie_head(model)
    model.hf_quantizer = HiggsHfQuantizer(hf_config, pre_quantized=True)
    model.is_quantized = True


def _untie_head(model: Any) -> None:
    """The head has tensors of its own now."""
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    tied = model.all_tied_weights_keys
    model.all_tied_weights_keys = {key: source for key, source in tied.items() if layer_name(key) != head}


def detach(model: Any) -> None:
    """The model is an ordinary one again."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
