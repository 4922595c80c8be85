"""Tables for readers."""

from __future__ import annotations

from typing import Any

from ..allocate import Allocation
from ..checkpoint import Inspection
from ..sensitivity import Sensitivities


def size_text(count: int) -> str:
    """A number of bytes with a fitting unit."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def inspection_text(found: Inspection) -> str:
    """`higgs inspect` as plain text."""
    lines = []
    if found.layers:
        width = max(len(layer.layer) for layer in found.layers)
        lines.append(
            f"{'layer':{width}}  {'shape':>13}  {'grid':>9}  {'block':>5}  {'group':>5}  {'bits':>6}  {'t2':>8}  bytes"
        )
        for x in found.layers:
            t2 = "-" if x.t2 is None else f"{x.t2:.6f}"
            lines.append(
                f"{x.layer:{width}}  {f'{x.n}x{x.k}':>13}  {x.grid:>9}  {x.block:>5}  {x.group:>5}  {x.bits:6.3f}  "
                f"{t2:>8}  {size_text(x.bytes)}{', column scale' if x.column_scale else ''}"
            )
    lines += [f"{name}: not quantized, {reason}" for name, reason in found.skipped.items()]
    lines += found.notes
    for dtype, (tensors, elements, size) in sorted(found.other.items()):
        lines.append(f"as they are: {tensors} tensors {dtype}, {elements / 1e6:.2f} M values, {size_text(size)}")
    total = f"{found.path}: {size_text(found.bytes)} in {found.shards} file{'s' if found.shards > 1 else ''}"
    if found.bits is None:
        return "\n".join([*lines, f"{total}, not quantized"])
    t2 = "" if found.t2 is None else f", mean t2 {found.t2:.6f}"
    weights = sum(x.n * x.k for x in found.layers)
    return "\n".join(
        [*lines, f"{total}; {len(found.layers)} layers, {weights / 1e6:.1f} M weights at {found.bits:.3f} bits{t2}"]
    )


def allocation_text(found: Allocation) -> str:
    """`higgs plan` as plain text."""
    width = max(len(layer.name) for layer in found.layers)
    lines = [f"{'layer':{width}}  {'shape':>13}  {'alpha':>9}  {'grid':>9}  {'bits':>6}  {'t2':>8}  {'loss':>9}"]
    for x in found.layers:
        lines.append(
            f"{x.name:{width}}  {f'{x.n}x{x.k}':>13}  {x.alpha:9.6f}  {x.grid:>9}  {x.bits:6.3f}  {x.t2:8.6f}  "
            f"{x.loss:9.6f}"
        )
    lines += [f"{name}: left out, {reason}" for name, reason in found.skipped.items()]
    lines += found.notes
    counts: dict[str, int] = {}
    for x in sorted(found.layers, key=lambda x: x.bits):
        counts[x.grid] = counts.get(x.grid, 0) + 1
    lines.append(", ".join(f"{grid} {count}" for grid, count in counts.items()))
    optimum = "the optimum" if found.gap == 0 else f"at most {found.gap:.2g} above the optimum"
    perplexity = "" if found.predicted_perplexity is None else f", perplexity {found.predicted_perplexity:.4f}"
    error = "" if found.predicted_error is None else f" ± {found.predicted_error:.6f}"
    unit = "us" if found.unit == "ns" else found.unit
    cost, budget = (v / 1000 if found.unit == "ns" else v for v in (found.cost, found.budget))
    loss = f"{found.predicted_loss:.6f}{error} ({found.corrected_loss:.6f} with low-rate correction)"
    if found.first_order:
        loss += f", of it {found.first_order:.6f} of first order on the text of the sensitivities"
    lines.append(
        f"{found.bits:.4f} bits a weight, {cost:,} of {budget:,} {unit}; predicted loss increase {loss}{perplexity} "
        f"({optimum})"
    )
    return "\n".join(lines)


def sensitivities_text(found: Sensitivities) -> str:
    """`higgs measure` as plain text."""
    width = max(len(x.name) for x in found.layers)
    total = sum(x.alpha for x in found.layers)
    lines = [f"{'layer':{width}}  {'shape':>13}  {'alpha':>9}  {'share':>6}  residual"]
    for x in found.layers:
        share = x.alpha / total if total else 0.0
        residual = "-" if x.residual is None else f"{x.residual:.3f}"
        lines.append(f"{x.name:{width}}  {f'{x.n}x{x.k}':>13}  {x.alpha:9.6f}  {100 * share:4.1f} %  {residual:>8}")
    error = "" if found.relative_error is None else f" ± {found.relative_error * total:.4f}"
    first_order = sum(x.first_order for x in found.layers)
    text = f", of first order on the text {first_order:.4f} nats" if first_order else ""
    return "\n".join([*lines, f"{len(found.layers)} layers, sum of sensitivities {total:.4f}{error} nats{text}"])


def demo_text(result: dict[str, Any]) -> str:
    """`higgs demo` as plain text."""
    rows = result["rows"]
    width = max(len(row["method"]) for row in rows)
    lines = [f"{'method':{width}}  {'bits':>6}  {'MB':>6}  {'perplexity':>10}  {'tokens/s':>8}"]
    for row in rows:
        speed = "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.1f}"
        numbers = f"{row['bits']:6.3f}  {row['megabytes']:6.1f}  {row['perplexity']:10.2f}"
        lines.append(f"{row['method']:{width}}  {numbers}  {speed:>8}")
    lines.append(f"WikiText-2, {result['windows']} windows of {result['context']} tokens; plot: {result['plot']}")
    return "\n".join([*lines, "", result["sentence"]])
