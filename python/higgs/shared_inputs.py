"""One launch for the layers of a transformers model that read the same input: q/k/v and gate/up.

Hooks on attention and MLP modules compute these layers together when the module is entered; each layer, when it is
called, takes its part. So modules, parameter names, adapters and hooks on the layers themselves are what they were. A
layer takes its part only for the very tensor that its module was entered with, and only until the module is left: one
that is called with anything else, or by anyone else, computes as ever.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from .linear import can_share, linear_shared, pending

# Families of transformers whose {family}Attention and {family}MLP call these layers with their own, unchanged input.
_FAMILIES = frozenset(
    ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Granite", "Olmo2", "SmolLM3")
)
_READERS = {"Attention": ("q_proj", "k_proj", "v_proj"), "MLP": ("gate_proj", "up_proj")}


def share_inputs_(model: nn.Module, enabled: bool = True) -> list[str]:
    """Computes q/k/v and gate/up of known transformers architectures together or, with ``enabled`` False, no longer.
    Returns the names of the modules that they are in.

    :func:`higgs.quantize_` and ``from_pretrained`` have called it already. Only HiggsLinear layers on a CUDA device
    that rotate x alike (as :func:`higgs.linear_shared` has it) are computed together; all others, and those of other
    architectures and shards of tensor parallelism, one by one.
    """
    names = []
    for name, module in model.named_modules():
        if _readers(module):
            _remove_hooks(module)
            if enabled and not any(getattr(layer, "sharding", None) for layer in _layers(module)):
                module.register_forward_pre_hook(_enter, with_kwargs=True)
                module.register_forward_hook(_leave, always_call=True)
            names.append(name)
    return names


def _readers(module: nn.Module) -> tuple[str, ...]:
    kind = type(module)
    if not kind.__module__.startswith("transformers.models."):
        return ()
    for suffix, readers in _READERS.items():
        if kind.__name__.endswith(suffix) and kind.__name__.removesuffix(suffix) in _FAMILIES:
            return readers
    return ()


def _remove_hooks(module: nn.Module) -> None:
    hooks = {**module._forward_pre_hooks, **module._forward_hooks}
    for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
        for table in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs,
                      module._forward_hooks, module._forward_hooks_always_called):  # fmt: skip
            table.pop(key, None)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The readers, without the adapters around them."""
    layers = [cast(nn.Module, module._modules[name]) for name in _readers(module)]
    return [cast(nn.Module, layer._modules.get("base_layer", layer)) for layer in layers]


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layers = _layers(module)
    x = args[0] if args else kwargs.get("hidden_states")
    if isinstance(x, Tensor) and can_share(layers):
        for layer, y in zip(layers, linear_shared(x, layers), strict=True):
            pending[layer] = (x, y)


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for layer in _layers(module):
        pending.pop(layer, None)
