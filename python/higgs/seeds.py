"""Seeds of the signs: one for each input, shared by the layers that read it, so that one rotation of x serves them all.

With one seed for the whole model one draw would decide for every layer: the residual stream has the same massive
channels at every depth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .energies import Energies

# Layers of one parent that read the same input, where no forward pass has told: the names in use among transformers.
_READ_TOGETHER = (
    ("k_proj", "q_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("key", "query", "value"),
    ("wk", "wq", "wv"),
    ("w1", "w3"),
)
_FIRST = {leaf: min(leaves) for leaves in _READ_TOGETHER for leaf in leaves}


def layer_seeds(seed: int, layers: Iterable[str], energies: Energies | None = None) -> dict[str, int]:
    """The seed of each of ``layers`` (module names): a hash of the model's ``seed`` and the name of the layer's input.

    An input goes by the alphabetically first layer that reads it, as ``energies`` saw it; other layers by their names
    (q/k/v, gate/up). So the seed depends neither on which layers are quantized nor on any order. It has 53 bits, which
    every reader of JSON holds exactly.
    """
    inputs = {layer: _input_by_name(layer) for layer in layers}
    for readers in energies.shared if energies is not None else []:
        inputs.update({layer: min(readers) for layer in readers if layer in inputs})
    return {layer: _hash(seed, name) for layer, name in inputs.items()}


def _input_by_name(layer: str) -> str:
    parent, dot, leaf = layer.rpartition(".")
    return f"{parent}{dot}{_FIRST.get(leaf, leaf)}"


def _hash(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 11
