"""Sensitivities: how much the loss rises per unit of relative squared error of each layer.

The linearity theorem (arXiv 2411.17525, section 3): loss(quantized) ~ loss(original) + sum_l alpha_l t2_l, in nats a
token; on a known text + sum_l first_order_l t2_l, as rounding shrinks the weights. This file holds the alphas and the
JSON they are kept in; ``higgs.measure`` makes them and says where they come from, ``higgs.allocate`` uses them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import FormatError

FORMAT = "higgs_sensitivities"
VERSION = 1


@dataclass(frozen=True)
class LayerSensitivity:
    """One Linear layer W[n, k]: ``alpha`` in nats per unit t2. ``residual``: root mean square deviation from the line
    relative to that of the measured values (None if none was fitted). ``column_scale``: whether the layer has one, on
    which alpha depends. ``first_order``: what the shrinking adds to the loss of the text that was measured on, nats per
    unit t2 (0 without one). It belongs to predictions for that text; it is too noisy layer by layer, and too much a
    matter of the text, to choose grids by."""

    name: str
    n: int
    k: int
    alpha: float
    column_scale: bool = True
    residual: float | None = None
    first_order: float = 0.0


@dataclass
class Sensitivities:
    """The alphas of a model; ``measured_t2`` maps a grid to (bits of an index per weight, t2) where a file brings its
    own, ``relative_error`` is the standard error of the sum of the alphas over that sum, from the choice of the tokens
    (None if not known), ``about`` says how they were made."""

    layers: list[LayerSensitivity]
    base_perplexity: float | None = None
    measured_t2: dict[str, tuple[float, float]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    relative_error: float | None = None

    @property
    def alphas(self) -> dict[str, float]:
        return {layer.name: layer.alpha for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        layers = []
        for x in self.layers:
            entry: dict[str, Any] = {"name": x.name, "alpha": x.alpha, "shape": [x.n, x.k]}
            entry["column_scale"] = x.column_scale
            if x.residual is not None:
                entry["residual"] = x.residual
            if x.first_order:
                entry["first_order"] = x.first_order
            layers.append(entry)
        data: dict[str, Any] = {"format": FORMAT, "version": VERSION, **self.about}
        if self.base_perplexity is not None:
            data["base_perplexity"] = self.base_perplexity
        if self.relative_error is not None:
            data["relative_error"] = self.relative_error
        if self.measured_t2:
            data["measured_t2"] = {name: {"bits": b, "t2": t2} for name, (b, t2) in self.measured_t2.items()}
        return {**data, "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str = "sensitivities") -> Sensitivities:
        """``data`` needs ``layers``: a list of objects with ``name``, ``alpha`` and ``shape`` [n, k]. A key that starts
        with ``base_ppl`` or ``base_perplexity`` is the perplexity of the original.

        Raises FormatError that says what is wrong with the file ``name``.
        """
        if data.get("format", FORMAT) != FORMAT or data.get("version", VERSION) != VERSION:
            found = f"{data.get('format')!r} version {data.get('version')!r}"
            raise FormatError(f"{name} holds {found}, expected {FORMAT!r} version {VERSION}")
        entries = data.get("layers")
        if not isinstance(entries, list) or not entries:
            raise FormatError(f"{name} has no list of layers")
        layers = [_layer(entry, name) for entry in entries]
        names = [layer.name for layer in layers]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise FormatError(f"{name} lists layer {twice} twice")
        try:
            measured = {g: (float(m["bits"]), float(m["t2"])) for g, m in data.get("measured_t2", {}).items()}
            base = [float(v) for k, v in data.items() if k.startswith(("base_ppl", "base_perplexity"))]
            error = None if data.get("relative_error") is None else float(data["relative_error"])
        except (TypeError, KeyError, ValueError, AttributeError) as e:
            raise FormatError(f"{name}: malformed measured_t2, base perplexity or relative error: {e!r}") from None
        own = ("format", "version", "layers", "measured_t2", "relative_error")
        about = {k: v for k, v in data.items() if k not in own and not k.startswith("base_p")}
        return cls(layers, base[0] if base else None, measured, about, error)

    def save(self, path: str | Path) -> None:
        from .checkpoint.files import json_bytes, write_file

        write_file(Path(path), json_bytes(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivities:
        """Raises FileNotFoundError or FormatError."""
        from .checkpoint.files import read_json

        if not Path(path).is_file():
            raise FileNotFoundError(f"no sensitivities file at {path}; make it with `higgs measure`")
        return cls.from_dict(read_json(Path(path)), str(path))


def _layer(entry: Any, file: str) -> LayerSensitivity:
    try:
        name, alpha, (n, k) = entry["name"], entry["alpha"], entry["shape"]
        if not (isinstance(name, str) and type(n) is int and type(k) is int and n > 0 and k > 0):
            raise ValueError("name is no text, or shape is not two positive integers")
        if isinstance(alpha, bool) or not math.isfinite(alpha):
            raise ValueError("alpha is not a finite number")
        residual, first_order = entry.get("residual"), entry.get("first_order", 0.0)
        if isinstance(first_order, bool) or not math.isfinite(first_order):
            raise ValueError("first_order is not a finite number")
        return LayerSensitivity(
            name,
            n,
            k,
            float(alpha),
            bool(entry.get("column_scale", True)),
            None if residual is None else float(residual),
            float(first_order),
        )
    except (TypeError, KeyError, ValueError) as e:
        raise FormatError(f"{file}: malformed layer {json.dumps(entry, default=str)[:200]}: {e}") from None
