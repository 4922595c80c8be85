"""Experts of a mixture in a checkpoint: which tensors make the rows of their projections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..moe import PROJECTIONS, experts_modules, layer_of
from .files import Checkpoint


@dataclass(frozen=True)
class ExpertsLayer:
    """The tensors ``sources``, one below the other, are the rows [n, k] of a projection of all ``experts``, expert by
    expert. They become the layer ``name``; in transformers it is ``module``."""

    name: str
    module: str
    sources: tuple[str, ...]
    experts: int
    n: int
    k: int


def find_experts(checkpoint: Checkpoint, model: Any, targets: Mapping[str, tuple[str, Any, str]]) -> list[ExpertsLayer]:
    """The experts of the meta-device ``model``. ``targets``: for each tensor the parameter that transformers makes of
    it, and the converter, if any, with the pattern that the tensor's name fits.

    Left out are experts whose tensors are not all there, or not just put together by the converter.
    """
    tensors: dict[str, list[str]] = {}
    for tensor, (parameter, _, _) in targets.items():
        tensors.setdefault(parameter, []).append(tensor)
    found = []
    for module, experts in experts_modules(model).items():
        pair = []
        for parameter, weight in experts.named_parameters(recurse=False):
            sources = _in_order(tensors.get(f"{module}.{parameter}", []), targets, len(weight))
            count, n, k = weight.shape
            entries = [checkpoint.tensors[source] for source in sources]
            fits = all(e.shape[-1] == k and len(e.shape) in (2, 3) for e in entries)
            if not fits or sum(e.elements for e in entries) != weight.numel():
                break
            name, layer = _layer_in_file(sources[0], parameter), f"{module}.{PROJECTIONS[parameter]}"
            pair.append(ExpertsLayer(name, layer, tuple(sources), count, count * n, k))
        found += pair if len(pair) == len(PROJECTIONS) else []
    return found


def _in_order(tensors: list[str], targets: Mapping[str, tuple[str, Any, str]], experts: int) -> list[str]:
    """The tensors that make a parameter, in the order of its rows; none if that is not known."""
    if not tensors:
        return []
    _, converter, _ = targets[tensors[0]]
    if converter is None:
        return tensors
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    if operations not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return []
    columns = [
        sorted((t for t in tensors if targets[t][2] == pattern), key=_expert) for pattern in converter.source_patterns
    ]
    if any([_expert(t) for t in column] != list(range(experts)) for column in columns):
        return []
    return [tensor for row in zip(*columns, strict=True) for tensor in row]


def _expert(tensor: str) -> int:
    """The number of the expert: the last one in the name."""
    return int(re.findall(r"\.(\d+)\.", tensor)[-1])


def _layer_in_file(source: str, parameter: str) -> str:
    """As transformers names it when it saves: beside the modules around it."""
    around = re.fullmatch(r"(.*)\.\d+\.[^.]+\.weight", source)
    return layer_of(f"{around[1]}.{parameter}" if around else source) or source
