"""`higgs measure`, `higgs plan`, `higgs report`, and what `higgs quantize` takes from them."""

from __future__ import annotations

import enum
import hashlib
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .options import (
    Json,
    MaybeFloat,
    MaybeInt,
    MaybePath,
    MaybeText,
    Model,
    ScaleExponent,
    emit,
    local_model,
    quiet_transformers,
    text_file,
)
from .output import guarded, working

if TYPE_CHECKING:
    from ..allocate import Allocation
    from ..progress import Progress
    from ..sensitivity import Sensitivities

Patterns = Optional[list[str]]  # noqa: UP045
Menu = Annotated[
    MaybeText,
    typer.Option(
        metavar="GRID,GRID,...", help="Grids to choose from (default: all vector grids, below 2 bits only if needed)."
    ),
]
Untie = Annotated[bool, typer.Option("--untie", help="Let q/k/v and gate/up of one layer have different grids.")]
LOW_RATE_HELP = "Correct for what the linear model misses at low rates: t2 (1 + 5 t2), or 14 without column scales."
LowRate = Annotated[bool, typer.Option("--low-rate", help=LOW_RATE_HELP)]
Fix = Annotated[Patterns, typer.Option(metavar="REGEX=GRID", help="Fix layers to a grid. May be repeated.")]
Skip = Annotated[Patterns, typer.Option(metavar="REGEX", help="Leave layers as they are. May be repeated.")]


class MeasureDevice(str, enum.Enum):
    """Where to run the model."""

    cpu = "cpu"
    cuda = "cuda"


@guarded
def plan(
    sensitivities: Annotated[Path, typer.Argument(metavar="SENSITIVITIES", help="File made by `higgs measure`.")],
    bits: Annotated[MaybeFloat, typer.Option(help="Budget in bits a weight, e.g. 3.25.")] = None,
    size: Annotated[MaybeInt, typer.Option("--bytes", help="Budget in bytes of all planned layers instead.")] = None,
    latency_us: Annotated[MaybeFloat, typer.Option(help="Budget in microseconds instead; needs --latencies.")] = None,
    latencies: Annotated[
        MaybePath, typer.Option(metavar="FILE", help="JSON lines with n, k, grid, m, us: measured kernel times.")
    ] = None,
    m: Annotated[int, typer.Option(min=1, help="Tokens a call in --latencies.")] = 1,
    menu: Menu = None,
    untie: Untie = False,
    fix: Fix = None,
    skip: Skip = None,
    low_rate: LowRate = False,
    index_bits: Annotated[bool, typer.Option("--index-bits", help="Count index bits only, no scales.")] = False,
    t2_from_file: Annotated[
        bool, typer.Option("--t2-from-file", help="Take rate and t2 of the grids from measured_t2 in the file.")
    ] = False,
    out: Annotated[MaybePath, typer.Option("-o", "--output", metavar="FILE", help="Also write the plan here.")] = None,
    json_output: Json = False,
) -> None:
    """Choose a grid for every layer under a budget, print the table and stop.

    The allocation is the exact optimum of the predicted loss (gap 0), or comes with a proven bound of what it lacks.
    """
    from ..allocate import grid_menu, latency_costs, plan_allocation
    from ..sensitivity import Sensitivities
    from .tables import allocation_text

    with working(json_output, quiet=True):
        known = Sensitivities.load(sensitivities)
        if t2_from_file and not known.measured_t2:
            raise ValueError(f"{sensitivities} has no measured_t2")
        table = None if latencies is None else latency_costs(_json_lines(latencies), m)
        chosen = None
        if menu is not None or t2_from_file:
            chosen = grid_menu(split_menu(menu), known.measured_t2 if t2_from_file else None)
        found = plan_allocation(
            known, bits=bits, size=size, latency_us=latency_us, latencies=table,
            menu=chosen,
            untie=untie, fixed=split_fixed(fix), skip=skip or (), low_rate=low_rate,
            index_bits_only=index_bits,
        )  # fmt: skip
        if out is not None:
            found.save(out)
    emit(json_output, found.to_dict(), allocation_text(found))


class Method(str, enum.Enum):
    """How to measure."""

    fisher = "fisher"
    noise = "noise"


class Objective(str, enum.Enum):
    """What noise raises."""

    kl = "kl"
    loss = "loss"


@guarded
def measure(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="File to write (.json).")],
    method: Annotated[
        Method, typer.Option(help="fisher: gradients, quick. noise: perturbs one layer at a time, slow.")
    ] = Method.fisher,
    text: Annotated[
        str, typer.Option(metavar="self|random|FILE", help="Tokens: sampled from the model, random, or of a text.")
    ] = "self",
    tokens: Annotated[MaybeInt, typer.Option(min=2, help="Number of tokens (fisher 8192, noise 2048).")] = None,
    context: Annotated[
        int, typer.Option(min=2, help="Tokens of a window: with less context, tokens are more sensitive.")
    ] = 1024,
    objective: Annotated[
        Objective, typer.Option(help="noise: KL from the original, or loss on the text (needs a FILE).")
    ] = Objective.kl,
    levels: Annotated[
        str, typer.Option(metavar="T2,T2,...", help="noise: relative squared errors.")
    ] = "0.01,0.02,0.04",
    scales: Annotated[
        str, typer.Option(metavar="self|random|none|FILE", help="Column scales of the checkpoint to be.")
    ] = "self",
    scale_exponent: ScaleExponent = 0.25,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Measure the output head too.")] = False,
    seed: Annotated[int, typer.Option(help="Of tokens, noise and labels.")] = 0,
    device: Annotated[MeasureDevice, typer.Option(help="Where to run the model.")] = MeasureDevice.cpu,
    force: Annotated[bool, typer.Option("--force", help="Start over, whatever there is of an earlier run.")] = False,
    json_output: Json = False,
) -> None:
    """Measure how sensitive the loss of MODEL is to errors of each layer, for `higgs plan` and `higgs quantize`.

    An interrupted run continues when called again. `torchrun --nproc-per-node N -m higgs.cli measure ...` shares the
    work among N processes (one a GPU with --device cuda).
    """
    from ..checkpoint.measure import MeasureOptions, measure_checkpoint
    from ..jobs import rank
    from .tables import sensitivities_text

    try:
        parsed = tuple(float(word) for word in levels.split(","))
    except ValueError:
        raise ValueError(f"--levels {levels!r}: use numbers separated by commas") from None
    with working(json_output, quiet=rank() > 0) as progress:
        quiet_transformers()
        options = MeasureOptions(
            method=method.value, text=text, tokens=tokens, context=context, objective=objective.value, levels=parsed,
            scales=scales, scale_exponent=scale_exponent, lm_head=lm_head, seed=seed,
        )  # fmt: skip
        found = measure_checkpoint(
            local_model(model), out, options, force=force, device=device.value, progress=progress
        )
    if rank() == 0:
        emit(json_output, {"output": str(out), **found.to_dict()}, f"{sensitivities_text(found)}\n{out}")


@guarded
def report(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Quantized checkpoints.")],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Directory to write.")] = Path(
        "higgs-report"
    ),
    sensitivities: Annotated[
        MaybePath, typer.Option(metavar="FILE", help="Also show predicted losses; made by `higgs measure`.")
    ] = None,
    text: Annotated[MaybePath, typer.Option(help="Also measure the perplexity of OUT... on this text.")] = None,
    base: Annotated[MaybePath, typer.Option(help="The original model, for comparison.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[int, typer.Option(help="Number of windows, from the start of the text.")] = 16,
    json_output: Json = False,
) -> None:
    """Draw quantized checkpoints: bits, errors and losses layer by layer, perplexity against bits, prediction against
    measurement. Writes one HTML file, and its pictures as PNG files."""
    from ..checkpoint.work import read_report
    from ..evaluate import evaluate, mirror_perplexity
    from ..pictures import Subject, write_pictures
    from ..sensitivity import Sensitivities

    def perplexity(model: Path) -> float | None:
        return None if text is None else evaluate(model, text, context, windows, progress=progress)["perplexity"]

    def mirror(model: Path) -> float | None:
        if text is None or base is None or sensitivities is None:
            return None
        return mirror_perplexity(model, base, text, context, windows, progress)

    with working(json_output) as progress:
        known = None if sensitivities is None else Sensitivities.load(sensitivities)
        reports = [read_report(local_model(path))[0] for path in checkpoints]
        if text is not None:
            quiet_transformers()
            text_file(text)
        original = None if base is None else perplexity(local_model(base))
        subjects = [
            Subject(p.resolve().name, r, perplexity(p), mirror(p)) for p, r in zip(checkpoints, reports, strict=True)
        ]
        files = write_pictures(out, subjects, known, original)
    emit(json_output, {"output": [str(f) for f in files], "base_perplexity": original,
                       "perplexity": {s.name: s.perplexity for s in subjects}}, str(files[0]))  # fmt: skip


def split_menu(text: str | None) -> list[str] | None:
    """The names in "a,b,c"."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def split_fixed(words: list[str] | None) -> dict[str, str]:
    """{pattern: grid} from "PATTERN=GRID"; the last "=" counts."""
    result = {}
    for word in words or []:
        pattern, equals, grid = word.rpartition("=")
        if not equals or not pattern:
            raise ValueError(f"{word!r} is not of the form REGEX=GRID")
        result[pattern] = grid
    return result


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not all(isinstance(row, dict) and {"n", "k", "grid", "m", "us"} <= row.keys() for row in rows):
            raise ValueError("a line lacks one of n, k, grid, m, us")
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return rows


def allocation_choice(
    model: Path, bits: float | None, grid: str | None, plan: Path | None, sensitivities: Path | None,
    menu: str | None, untie: bool, low_rate: bool | None, fix: list[str] | None, lm_head: bool, layout: dict[str, Any],
    progress: Progress,
) -> tuple[Callable[[Path], Allocation], str] | None:  # fmt: skip
    """A function that makes the allocation `higgs quantize` asks for (it gets a path for sensitivities that have to be
    measured), and the options that stand for it as a setting; None if one grid is to serve all layers.

    ``low_rate``: None if the user has not said; then with the correction.
    ``layout``: scales, scale_exponent, seed, block and group of the checkpoint to be."""
    from .. import _core
    from ..allocate import Allocation, grid_menu, plan_allocation
    from ..patterns import compiled
    from ..sensitivity import Sensitivities

    words = [] if menu is None else ["--menu", ",".join(split_menu(menu) or [])]
    words += (
        ["--untie"] * untie
        + ([] if low_rate is None else ["--low-rate" if low_rate else "--no-low-rate"])
        + [word for f in fix or [] for word in ("--fix", f)]
        + ["--lm-head"] * lm_head
    )
    if plan is not None:
        if bits is not None or grid is not None or sensitivities is not None or words:
            raise ValueError("--plan decides all grids; leave out --bits, --grid, --sensitivities and options of plans")
        found = Allocation.load(plan)
        return lambda _: found, f"--plan {_named(plan)}"
    if grid is not None or bits is None:
        if sensitivities is not None or words:
            raise ValueError(
                "--sensitivities, --menu, --untie, --low-rate, --fix and --lm-head need --bits, the budget"
            )
        return None
    if sensitivities is None and not words and bits in {g.rate for g in _core.grids()}:
        return None
    known = None if sensitivities is None else Sensitivities.load(sensitivities)
    if sensitivities is not None:
        words += ["--sensitivities", _named(sensitivities)]
    chosen, fixed = None if menu is None else grid_menu(split_menu(menu)), split_fixed(fix)
    compiled("fix", fixed)  # these checks: before anything is measured
    lowest = float(min(g.rate for g in chosen or grid_menu()))
    if not math.isfinite(bits):
        raise ValueError(f"bits {bits} is not supported; use a positive number of bits a weight")
    if bits < lowest:
        raise ValueError(
            f"{bits:g} bits a weight are less than the lowest rate of the menu, {lowest:g}, without scales"
        )

    def allocate(kept: Path) -> Allocation:
        return plan_allocation(
            known or _measure_for(model, kept, layout, lm_head, progress), bits=bits, menu=chosen, untie=untie,
            low_rate=low_rate is not False, fixed=fixed, column_scales=layout["scales"] != "none",
            block=layout["block"], group=layout["group"],
        )  # fmt: skip

    return allocate, shlex.join(["--bits", f"{bits:g}", *words])


def _named(path: Path) -> str:
    """Name and hash: a file as a setting."""
    return f"{path.name} ({hashlib.sha256(path.read_bytes()).hexdigest()[:16]})"


def _measure_for(model: Path, out: Path, layout: dict[str, Any], lm_head: bool, progress: Progress) -> Sensitivities:
    from ..checkpoint.measure import MeasureOptions, measure_checkpoint

    quiet_transformers()
    options = MeasureOptions(
        scales=layout["scales"], scale_exponent=layout["scale_exponent"], seed=layout["seed"], lm_head=lm_head
    )
    return measure_checkpoint(model, out, options, progress=progress)
