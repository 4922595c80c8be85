"""`higgs report`: quantized checkpoints as pictures, in one HTML file."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _core
from .errors import HiggsError
from .report import LayerReport, Report
from .sensitivity import Sensitivities


@dataclass(frozen=True)
class Subject:
    """A quantized checkpoint: its report, and its perplexity and that of its mirror image (evaluate.mirror_), if they
    were measured."""

    name: str
    report: Report
    perplexity: float | None = None
    mirror_perplexity: float | None = None

    def increase(self, base: float | None) -> float | None:
        """Of the loss over that of the original with perplexity ``base``, in nats."""
        return None if base is None or self.perplexity is None else math.log(self.perplexity / base)

    def luck(self, first_order: float = 0.0) -> float | None:
        """The part of the increase that changes sign with the rounding errors, less its mean over the draws of the
        signs, ``first_order``: no prediction knows it."""
        if self.perplexity is None or self.mirror_perplexity is None:
            return None
        return 0.5 * math.log(self.perplexity / self.mirror_perplexity) - first_order


def kind_of(layer: str) -> str:
    """The projection: the last part of the name."""
    return layer.rpartition(".")[2]


def predicted_increase(report: Report, sensitivities: Sensitivities) -> tuple[float, float] | None:
    """(sum (alpha_l + first_order_l) t2_l with the t2 that quantizing measured, of it the first order); None if a layer
    has no alpha."""
    known = {x.name: x for x in sensitivities.layers}
    if any(x.layer not in known for x in report.layers):
        return None
    first_order = sum(known[x.layer].first_order * x.t2 for x in report.layers)
    return sum(known[x.layer].alpha * x.t2 for x in report.layers) + first_order, first_order


def write_pictures(
    out: Path, subjects: Sequence[Subject], sensitivities: Sensitivities | None = None, base: float | None = None
) -> list[Path]:
    """Writes ``report.html`` and the pictures in it as PNG files into ``out``; returns all paths, the page first.

    Layer by layer for the first of ``subjects``; perplexity against bits for all. ``base``: perplexity of the original.
    Raises HiggsError without matplotlib.
    """
    known = sensitivities or Sensitivities([])
    alphas, first = known.alphas, subjects[0].report
    titles: list[tuple[str, str, Callable[[Any], None]]] = [
        ("bits", "Bits a weight, layer by layer", lambda ax: _draw_bits(ax, first)),
        ("kinds", "Bits a weight by projection", lambda ax: _draw_kinds(ax, first)),
        ("t2", "Relative squared error against that of the grid on Gaussian weights", lambda ax: _draw_t2(ax, first)),
    ]
    if any(x.layer in alphas for x in first.layers):
        titles.append(("loss", "Predicted loss increase (nats)", lambda ax: _draw_loss(ax, first, alphas)))
    if any(s.perplexity is not None for s in subjects):
        titles.append(("pareto", "Perplexity against bits", lambda ax: _draw_pareto(ax, subjects, base)))
    points = _predictions(subjects, known, base)
    if points:
        titles.append(
            ("linearity", "Loss increase: prediction and measurement", lambda ax: _draw_linearity(ax, points))
        )
    out.mkdir(parents=True, exist_ok=True)
    pictures = [(_picture(out / f"{name}.png", title, draw), title) for name, title, draw in titles]
    page = out / "report.html"
    page.write_text(_page(subjects, known, base, pictures), encoding="utf-8")
    return [page, *(path for path, _ in pictures)]


def _picture(path: Path, title: str, draw: Callable[[Any], None]) -> Path:
    try:
        import matplotlib
    except ImportError as e:
        raise HiggsError("pictures need matplotlib: pip install 'higgs-quant[demo]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    draw(axes)
    axes.set_title(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _by_kind(layers: Sequence[LayerReport]) -> dict[str, list[tuple[int, LayerReport]]]:
    """{projection: [(position, layer)]}"""
    kinds: dict[str, list[tuple[int, LayerReport]]] = {}
    for i, x in enumerate(layers):
        kinds.setdefault(kind_of(x.layer), []).append((i, x))
    return kinds


def _draw_bits(axes: Any, report: Report) -> None:
    for kind, layers in _by_kind(report.layers).items():
        axes.bar([i for i, _ in layers], [x.bits for _, x in layers], width=1.0, label=kind)
    axes.axhline(report.bits, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("layer (dashed: mean)")
    axes.set_ylabel("bits")
    axes.legend(ncols=7, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _draw_kinds(axes: Any, report: Report) -> None:
    kinds = {kind: Report([x for _, x in layers]).bits for kind, layers in _by_kind(report.layers).items()}
    axes.bar_label(axes.bar(list(kinds), list(kinds.values())), fmt="%.2f")
    axes.set_ylabel("bits")


def _draw_t2(axes: Any, report: Report) -> None:
    for kind, layers in _by_kind(report.layers).items():
        ratios = [x.t2 / _core.find_grid(x.grid).t2 for _, x in layers]
        axes.plot([i for i, _ in layers], ratios, ".", label=kind)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("layer")
    axes.set_ylabel("t2 / t2 of the grid")
    axes.legend(ncols=7, fontsize="small")


def _draw_loss(axes: Any, report: Report, alphas: Mapping[str, float]) -> None:
    known = [x for x in report.layers if x.layer in alphas]
    for kind, layers in _by_kind(known).items():
        axes.bar([i for i, _ in layers], [alphas[x.layer] * x.t2 for _, x in layers], width=1.0, label=kind)
    axes.set_xlabel("layer")
    axes.set_ylabel("alpha t2 (nats)")
    axes.legend(ncols=7, fontsize="small")


def _draw_pareto(axes: Any, subjects: Sequence[Subject], base: float | None) -> None:
    for s in subjects:
        if s.perplexity is not None:
            axes.plot(s.report.bits, s.perplexity, "o")
            axes.annotate(s.name, (s.report.bits, s.perplexity), xytext=(5, 4), textcoords="offset points")
    if base is not None:
        axes.axhline(base, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("bits a weight" + (" (dashed: original)" if base is not None else ""))
    axes.set_ylabel("perplexity")


def _predictions(
    subjects: Sequence[Subject], sensitivities: Sensitivities, base: float | None
) -> list[tuple[str, float, float, float]]:
    """(name, predicted, measured loss increase in nats, luck of the draw or 0) of the subjects whose are known."""
    points = []
    for s in subjects:
        found, measured = predicted_increase(s.report, sensitivities), s.increase(base)
        if found is not None and measured is not None:
            points.append((s.name, found[0], measured, s.luck(found[1]) or 0.0))
    return points


def _draw_linearity(axes: Any, points: Sequence[tuple[str, float, float, float]]) -> None:
    top = max(max(p, m) for _, p, m, _ in points)
    axes.plot([0, top], [0, top], color="black", linewidth=0.8, linestyle="--")
    for name, predicted, measured, luck in points:  # the bar ends at the mirror image, its middle is what is predicted
        axes.plot(predicted, measured, "o")
        axes.errorbar(predicted, measured - luck, yerr=abs(luck), color="gray", capsize=3, zorder=0)
        axes.annotate(name, (predicted, measured), xytext=(5, -8), textcoords="offset points")
    axes.set_xlabel("predicted (nats; dashed: as predicted)")
    axes.set_ylabel("measured (nats; bars: to the mirrored errors)")


def _page(
    subjects: Sequence[Subject], sensitivities: Sensitivities, base: float | None, pictures: Sequence[tuple[Path, str]]
) -> str:
    def number(x: float | None, places: int) -> str:
        return "" if x is None else f"{x:.{places}f}"

    rows = []
    for s in subjects:
        predicted, first_order = predicted_increase(s.report, sensitivities) or (None, None)
        measured, luck = s.increase(base), s.luck(first_order or 0.0)
        cells = [html.escape(s.name), number(s.report.bits, 3), number(s.report.t2, 5), number(s.perplexity, 3),
                 number(predicted, 4), number(first_order, 4), number(measured, 4), number(luck, 4)]  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ("checkpoint", "bits", "mean t2", "perplexity", "predicted increase", "of it first order",
             "measured increase", "of it luck of the draw")  # fmt: skip
    images = [
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path, title in pictures
    ]
    original = "" if base is None else f"<p>Perplexity of the original: {base:.3f}. Increases are in nats.</p>"
    title = f"higgs: {html.escape(subjects[0].name)}"
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            "<style>body{font-family:sans-serif;max-width:72em;margin:auto;padding:1em}img{max-width:100%}"
            "td,th{padding:.2em .8em;text-align:right}td:first-child{text-align:left}</style></head><body>",
            f"<h1>{title}</h1><table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>",
            *rows,
            f"</table>{original}",
            *images,
            "</body></html>",
            "",
        ]
    )
