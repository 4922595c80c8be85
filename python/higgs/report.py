"""What quantizing a model did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ._ops import LayerFormat


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer. ``t2`` is its relative squared error (in the column-scaled space if it has a column scale),
    ``bits`` the effective bits per weight with scales counted, ``bytes`` what it takes in a file."""

    layer: str
    n: int
    k: int
    grid: str
    bits: float
    t2: float
    bytes: int
    seconds: float
    column_scale: bool

    @classmethod
    def of(cls, layer: str, fmt: LayerFormat, *, column_scale: bool, t2: float, seconds: float) -> LayerReport:
        return cls(
            layer, fmt.n, fmt.k, fmt.grid, fmt.bits(column_scale), t2, fmt.stored_bytes(column_scale), seconds,
            column_scale,
        )  # fmt: skip


@dataclass
class Report:
    """All quantized layers, and those left alone with the reason."""

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def bits(self) -> float:
        """Effective bits per weight over the quantized layers."""
        weights = sum(r.n * r.k for r in self.layers)
        return 8 * sum(r.bytes for r in self.layers) / weights if weights else 0.0

    @property
    def t2(self) -> float:
        """Mean t2 over the quantized layers."""
        return sum(r.t2 for r in self.layers) / len(self.layers) if self.layers else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "t2": self.t2,
            "layers": [asdict(r) for r in self.layers],
            "skipped": self.skipped,
            "notes": self.notes,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        return cls([LayerReport(**r) for r in data["layers"]], dict(data["skipped"]), list(data["notes"]))

    def __str__(self) -> str:
        width = max([len(r.layer) for r in self.layers], default=5)
        lines = [f"{'layer':{width}}  {'shape':>13}  {'grid':>9}  {'bits':>6}  {'t2':>9}  {'seconds':>7}"]
        lines += [
            f"{r.layer:{width}}  {f'{r.n}x{r.k}':>13}  {r.grid:>9}  {r.bits:6.3f}  {r.t2:9.6f}  {r.seconds:7.3f}"
            for r in self.layers
        ]
        lines += [f"{name}: not quantized, {reason}" for name, reason in self.skipped.items()]
        lines += self.notes
        lines.append(f"{len(self.layers)} layers, {self.bits:.3f} bits a weight, mean t2 {self.t2:.6f}")
        return "\n".join(lines)
