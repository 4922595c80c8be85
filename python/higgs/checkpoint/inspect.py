"""What is in a checkpoint: layers, grids, bits, bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import _core
from .._ops import LayerFormat
from ..config import LayerConfig, QuantizationConfig
from ..errors import FormatError
from .files import Checkpoint, TensorEntry
from .plan import natural
from .work import REPORT_FILE, read_report


@dataclass
class LayerInfo:
    """One quantized layer as stored. ``bits`` are effective bits per weight; ``t2`` is None if no report is there."""

    layer: str
    n: int
    k: int
    grid: str
    block: int
    group: int
    seed: int
    column_scale: bool
    bits: float
    bytes: int
    t2: float | None


@dataclass
class Inspection:
    """A checkpoint at a glance. ``other`` maps a dtype to (tensors, elements, bytes) of what is not quantized."""

    path: str
    format_version: int | None
    bits: float | None
    t2: float | None
    bytes: int
    shards: int
    layers: list[LayerInfo] = field(default_factory=list)
    other: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Lists a checkpoint, quantized or not, from its headers.

    Raises FormatError if it is broken: also for an unknown format version, or a tensor of a quantized layer that is
    missing or has another dtype or shape than FORMAT.md says.
    """
    checkpoint = Checkpoint(path)
    layers: list[LayerInfo] = []
    config = checkpoint.config.get("quantization_config")
    parsed = None
    packed: set[str] = set()
    if isinstance(config, dict):
        parsed = QuantizationConfig.from_dict(config)
        report = read_report(checkpoint.path)[0] if (checkpoint.path / REPORT_FILE).exists() else None
        t2 = {r.layer: r.t2 for r in report.layers} if report else {}
        for name in sorted(parsed.layers, key=natural):
            entry = parsed.layers[name]
            fmt = stored_format(checkpoint, name, entry)
            layers.append(_layer_info(name, entry, fmt, t2.get(name)))
            packed |= {f"{name}.{part}" for part in ("indices", "scales", "column_scale", "weight")}
    other: dict[str, tuple[int, int, int]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.name not in packed:
            count, elements, size = other.get(tensor.dtype, (0, 0, 0))
            other[tensor.dtype] = (count + 1, elements + tensor.elements, size + tensor.nbytes)
    weights = sum(layer.n * layer.k for layer in layers)
    known = [layer.t2 for layer in layers if layer.t2 is not None]
    result = Inspection(
        path=str(path),
        format_version=_core.format_version if parsed else None,
        bits=8 * sum(layer.bytes for layer in layers) / weights if weights else None,
        t2=sum(known) / len(known) if known else None,
        bytes=sum((checkpoint.path / shard).stat().st_size for shard in checkpoint.shards),
        shards=len(checkpoint.shards),
        layers=layers,
        other=other,
    )
    if parsed and report:
        result.skipped, result.notes = report.skipped, report.notes
    return result


def stored_format(checkpoint: Checkpoint, name: str, config: LayerConfig) -> LayerFormat:
    """The format of a quantized layer, its tensors checked against FORMAT.md. Raises FormatError, naming both sides."""
    indices = _entry(checkpoint, f"{name}.indices")
    grid: Any = _core.find_grid(config.grid)
    if len(indices.shape) != 2:
        raise FormatError(f"tensor {indices.name} has shape {list(indices.shape)}, expected [n, bytes]")
    n, row_bytes = indices.shape
    fmt = config.format(name, n, row_bytes * 8 // grid.index_bits * grid.p)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "indices": ("U8", (n, fmt.row_bytes)),
        "scales": ("F16", (n, fmt.row_groups)),
    }
    if config.column_scale:
        expected["column_scale"] = ("F16", (fmt.k,))
    for part, (dtype, shape) in expected.items():
        entry = _entry(checkpoint, f"{name}.{part}")
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise FormatError(
                f"tensor {entry.name} is {entry.dtype} {list(entry.shape)}, "
                f"expected {dtype} {list(shape)} for {config.grid}"
            )
    return fmt


def _entry(checkpoint: Checkpoint, name: str) -> TensorEntry:
    if name not in checkpoint.tensors:
        raise FormatError(f"{checkpoint.path}: tensor {name} is missing, quantization_config lists its layer")
    return checkpoint.tensors[name]


def _layer_info(name: str, c: LayerConfig, fmt: LayerFormat, t2: float | None) -> LayerInfo:
    bits, size = fmt.bits(c.column_scale), fmt.stored_bytes(c.column_scale)
    return LayerInfo(name, fmt.n, fmt.k, c.grid, c.block, c.group, c.seed, c.column_scale, bits, size, t2)
