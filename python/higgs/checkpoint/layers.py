"""Which tensors of a checkpoint are weights of Linear layers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..embedding import input_embedding
from ..energies import ROUTER, quantizable_layers
from ..errors import UnsupportedError
from ..linear import is_conv1d
from .experts import ExpertsLayer, find_experts
from .files import Checkpoint

# Without a model class to ask: 2-D weights whose name has none of these as (part of) a component.
_NOT_LINEAR = re.compile(
    r"(^|[._])(embed\w*|wte|wpe|lm_head|norm\w*|\w*norm|ln\w*|router|conv\w*|score|classifier)([._]|$)"
)
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")


@dataclass
class LinearWeights:
    """``layers`` maps the tensor name of each Linear weight to the name of its module in transformers (which input
    energies go by); the two usually differ by ``.weight`` only. Those in ``transposed`` are [in_features, out_features]
    (Conv1D of GPT-2). ``experts`` are projections of experts of a mixture, in pairs. ``head`` is the output head's
    layer name and ``head_source`` the tensor that holds its weight: that of the embedding where they are ``tied``.
    ``embedding`` is the name of the input embedding in transformers and ``embedding_source`` its tensor."""

    layers: dict[str, str]
    transposed: set[str] = field(default_factory=set)
    experts: list[ExpertsLayer] = field(default_factory=list)
    head: str | None = None
    head_source: str | None = None
    tied: bool = False
    embedding: str | None = None
    embedding_source: str | None = None
    notes: list[str] = field(default_factory=list)


def layer_name(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def find_linear_weights(checkpoint: Checkpoint) -> LinearWeights:
    """Asks transformers which modules are ``nn.Linear`` or Conv1D: the model is built without memory (meta device).

    The output head, routers of experts and weights shared with an embedding are left out. Without transformers, or for
    an architecture unknown to it or with other tensor names, every 2-D ``*.weight`` tensor counts whose name has none
    of embed, wte, wpe, lm_head, norm, ln, router, conv, score, classifier as a component; a note says so.

    Raises UnsupportedError if nothing is found.
    """
    try:
        model = build_meta_model(checkpoint)
    except Exception as e:  # whatever a config can make transformers raise; the reason goes into the note
        return _guess(checkpoint, f"transformers cannot build this model ({_first_line(e)})")
    found = _from_model(checkpoint, model)
    if found is None:
        return _guess(checkpoint, f"no tensor is named like the layers of {type(model).__name__}")
    if not found.layers and not found.experts:
        raise UnsupportedError(f"{type(model).__name__} has no Linear layers besides the output head")
    return found


def build_meta_model(checkpoint: Checkpoint) -> Any:
    """The model of ``checkpoint`` on the meta device: modules and shapes, no memory, no network, no remote code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def module_keys(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """For each checkpoint tensor that transformers loads as it is, its name in ``model.state_dict()``.

    Tensors that it merges or converts (the experts of a mixture, say) are left out.
    """
    targets = _conversion_targets(model, tensors)
    return {name: key for name, (key, converter, _) in targets.items() if converter is None}


def _conversion_targets(model: Any, tensors: Iterable[str]) -> dict[str, tuple[str, Any, str]]:
    """For each tensor the key in ``model.state_dict()`` of what transformers makes of it, the converter, if there is
    one, and which of its patterns the name fits."""
    state = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # another transformers: names that differ are then not found, which a note tells
        return {name: (name, None, "") for name in tensors if name in state}
    conversions = get_model_conversion_mapping(model)
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    renamings: list[Any] = [c for c in conversions if not isinstance(c, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    result = {}
    for name in tensors:
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key in state:
            result[name] = (key, by_pattern[pattern] if pattern else None, pattern or "")
    return result


def _from_model(checkpoint: Checkpoint, model: Any) -> LinearWeights | None:
    """None if no tensor of the checkpoint carries the name of a Linear weight of ``model``."""
    modules = quantizable_layers(model)
    targets = _conversion_targets(model, checkpoint.tensors)
    keys = {tensor: key for tensor, (key, converter, _) in targets.items() if converter is None}
    experts = find_experts(checkpoint, model, targets)
    known = {*keys, *(source for layer in experts for source in layer.sources)}
    linear, other = {}, []
    for tensor, entry in checkpoint.tensors.items():
        module = layer_name(keys.get(tensor, ""))
        if module in modules and tensor.endswith(".weight") and len(entry.shape) == 2:
            linear[tensor] = module
        elif tensor not in known and len(entry.shape) in (2, 3) and entry.elements >= 1 << 12:
            other.append(entry)
    if modules and not linear:
        return None
    transposed = {tensor for tensor, module in linear.items() if is_conv1d(modules[module])}
    notes = []
    if other:
        weights = sum(e.elements for e in other)
        notes.append(
            f"{len(other)} matrices ({weights / 1e6:.1f} M weights) are no Linear layers in transformers and stay as "
            f"they are: {other[0].name}, ..."
        )
    return _with_head(checkpoint, model, keys, LinearWeights(linear, transposed, experts, notes=notes))


def _with_head(checkpoint: Checkpoint, model: Any, keys: dict[str, str], found: LinearWeights) -> LinearWeights:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    tensors = {key: tensor for tensor, key in keys.items()}
    found.embedding = input_embedding(model)
    found.embedding_source = tensors.get(f"{found.embedding}.weight")
    if head is None:
        return found
    found.tied = embedding is not None and head.weight is embedding.weight
    found.head = names[head]
    found.head_source = tensors.get(f"{names[embedding if found.tied else head]}.weight")
    return found


def _guess(checkpoint: Checkpoint, reason: str) -> LinearWeights:
    layers = {
        tensor: layer_name(tensor)
        for tensor, entry in checkpoint.tensors.items()
        if len(entry.shape) == 2
        and entry.dtype in ("F32", "F16", "BF16")
        and tensor.endswith(".weight")
        and not _NOT_LINEAR.search(tensor)
        and not ROUTER.search(layer_name(tensor))
    }
    if not layers:
        raise UnsupportedError(f"{checkpoint.path}: {reason}, and no tensor looks like a Linear weight")
    found = LinearWeights(layers, notes=[f"{reason}; the Linear layers were picked by the names of the tensors"])
    found.tied = bool(checkpoint.config.get("tie_word_embeddings", "lm_head.weight" not in checkpoint.tensors))
    embedding = next((t for t in checkpoint.tensors if _EMBEDDING.search(t)), None)
    found.embedding, found.embedding_source = layer_name(embedding or ""), embedding
    found.head_source = embedding if found.tied else "lm_head.weight"
    found.head = "lm_head" if found.head_source in checkpoint.tensors else None
    return found


def _first_line(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return lines[0] if lines else type(e).__name__
