"""`higgs plan`: which grid for which layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .options import Json, MaybeFloat, MaybeInt, MaybePath, MaybeText, emit
from .output import guarded, working

Patterns = Optional[list[str]]  # noqa: UP045
Menu = Annotated[
    MaybeText, typer.Option(metavar="GRID,GRID,...", help="Grids to choose from (default: all of the library).")
]
Untie = Annotated[bool, typer.Option("--untie", help="Let q/k/v and gate/up of one layer have different grids.")]
Fix = Annotated[Patterns, typer.Option(metavar="REGEX=GRID", help="Fix layers to a grid. May be repeated.")]
Skip = Annotated[Patterns, typer.Option(metavar="REGEX", help="Leave layers as they are. May be repeated.")]


@guarded
def plan(
    sensitivities: Annotated[Path, typer.Argument(metavar="SENSITIVITIES", help="File made by `higgs measure`.")],
    bits: Annotated[MaybeFloat, typer.Option(help="Budget in bits a weight, e.g. 3.25.")] = None,
    size: Annotated[MaybeInt, typer.Option("--bytes", help="Budget in bytes of all planned layers instead.")] = None,
    latency_us: Annotated[MaybeFloat, typer.Option(help="Budget in microseconds instead; needs --latencies.")] = None,
    latencies: Annotated[
        MaybePath, typer.Option(metavar="FILE", help="JSON lines with n, k, grid, m, us: measured kernel times.")
    ] = None,
    m: Annotated[int, typer.Option(help="Tokens a call in --latencies.")] = 1,
    menu: Menu = None,
    untie: Untie = False,
    fix: Fix = None,
    skip: Skip = None,
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
        found = plan_allocation(
            known, bits=bits, size=size, latency_us=latency_us, latencies=table,
            menu=grid_menu(split_menu(menu), known.measured_t2 if t2_from_file else None),
            untie=untie, fixed=split_fixed(fix), skip=skip or (), index_bits_only=index_bits,
        )  # fmt: skip
        if out is not None:
            found.save(out)
    emit(json_output, found.to_dict(), allocation_text(found))


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
