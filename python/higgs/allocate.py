"""Which grid for which layer under a budget: the menu, its exact costs, and the plan that the C++ allocator finds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from re import Pattern
from typing import Any

from . import _core
from ._ops import layer_format
from .errors import FormatError
from .patterns import compiled
from .sensitivity import LayerSensitivity, Sensitivities

# Projections of one parent module that runtimes fuse into one matrix and that read the same input.
_TIED = (
    {"q_proj", "k_proj", "v_proj"},
    {"gate_proj", "up_proj"},
    {"query", "key", "value"},
    {"w1", "w3"},
)


# The linear model under-predicts at low rates. Loss increases over those it predicts, for one grid in all layers, are
# 1.11 and 1.37 at t2 = 0.0078 and 0.021 as published for Llama-3.1-8B, about 1 + 14 t2. Column scales take away the
# layers that are the first to leave the straight line: with them SmolLM2-135M has 1.00, 0.99, 1.12 and 1.38 at 0.0077,
# 0.015, 0.029 and 0.057 (WikiText-2), a 29M-parameter Llama less. A factor of each layer's own t2 keeps the problem a
# sum over layers.
LOW_RATE = {False: 14.0, True: 5.0}  # by whether the layer has a column scale

# Grids below 2 bits are for budgets that need them: alphas are slopes at 0, and some layers that look insensitive (the
# first MLP) cannot bear t2 = 0.18. A 29M-parameter Llama at 2.25 bits: perplexity 41.4 without these grids, 43.3 with.
LOWEST_USUAL_RATE = 2


def corrected(t2: float, column_scale: bool) -> float:
    """t2 with the low-rate correction, which depends on whether the layer has a column scale: what alpha is multiplied
    by."""
    return t2 * (1 + LOW_RATE[column_scale] * t2)


@dataclass(frozen=True)
class MenuGrid:
    """A grid to choose: index bits a weight and t2."""

    name: str
    rate: Fraction
    t2: float


@dataclass(frozen=True)
class PlannedLayer:
    """The choice for one layer: ``bits`` a weight as the budget counts them, ``loss`` = alpha * t2 in nats."""

    name: str
    n: int
    k: int
    grid: str
    bits: float
    alpha: float
    t2: float
    loss: float


@dataclass
class Allocation:
    """A grid for every layer. ``bits`` are effective bits a weight (index bits if so counted), ``cost`` is the exact
    sum in ``unit``, at most ``budget``. ``predicted_loss`` is the linear sum alpha t2, ``corrected_loss`` that with
    :func:`corrected` t2, ``objective`` says which of these sums was minimized; no allocation is better by more than
    ``gap`` (0: the optimum). Both predictions, and the perplexity, which is that of the same one, include
    ``first_order``, the sum first_order t2 of sensitivities of a text, which was not minimized. ``predicted_error``:
    standard error of ``predicted_loss`` by that of the alphas (None if not known); a single draw of rounding errors
    differs from any prediction by more."""

    bits: float
    cost: int
    budget: int
    unit: str
    objective: str
    predicted_loss: float
    corrected_loss: float
    gap: float
    layers: list[PlannedLayer]
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    predicted_perplexity: float | None = None
    predicted_error: float | None = None
    first_order: float = 0.0

    @property
    def grids(self) -> dict[str, str]:
        """{layer: grid}"""
        return {layer.name: layer.grid for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        from .checkpoint.files import json_bytes, write_file

        write_file(Path(path), json_bytes(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """A plan saved by ``save`` or ``higgs plan -o``. Raises FileNotFoundError or FormatError."""
        from .checkpoint.files import read_json

        if not Path(path).is_file():
            raise FileNotFoundError(f"no plan at {path}; make it with `higgs plan -o`")
        data = read_json(Path(path))
        try:
            plan = cls(**{**data, "layers": [PlannedLayer(**layer) for layer in data["layers"]]})
            for layer in plan.layers:
                _core.find_grid(layer.grid)
            if not isinstance(plan.notes, list):
                raise TypeError(f"notes is {plan.notes!r}")
            plan.gap, plan.predicted_loss = float(plan.gap), float(plan.predicted_loss)
        except (KeyError, TypeError, ValueError) as e:
            raise FormatError(f"{path} is no plan: {e}") from None
        return plan


def grid_menu(
    names: Sequence[str] | None = None, measured: Mapping[str, tuple[float, float]] | None = None
) -> list[MenuGrid]:
    """The grids called ``names`` (default: all vector grids of the library), with the library's t2, or with rate and t2
    as ``measured`` has them. Raises ValueError for a name that is not there."""
    own = {g.name: MenuGrid(g.name, Fraction(g.index_bits, g.p), g.t2) for g in _core.grids()}
    if measured is not None:
        known = {name: MenuGrid(name, Fraction(str(bits)), t2) for name, (bits, t2) in measured.items()}
        names = [name for name in known if name in own] if names is None else names
    else:
        known = own
        names = [g.name for g in _core.grids() if g.family == "vector"] if names is None else names
    if not names:
        raise ValueError("the menu is empty")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"menu: no grid {unknown[0]!r}; use {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def stored_bits(
    layer: LayerSensitivity, rate: Fraction, column_scale: bool, *, block: int | None = None, group: int | None = None
) -> int:
    """Bits of a layer in a file (packed_format.h) for indices of ``rate`` bits a weight: indices, a scale per group,
    and the column scale if there is one."""
    return index_bits(layer, rate) + _scale_bits(layer.n, layer.k, column_scale, block, group)


@cache  # a model has few shapes
def _scale_bits(n: int, k: int, column_scale: bool, block: int | None, group: int | None) -> int:
    fmt = layer_format(n, k, _core.grids()[0].name, block=block, group=group)  # the same for every grid
    return 8 * (fmt.stored_bytes(column_scale) - n * fmt.row_bytes)


def index_bits(layer: LayerSensitivity, rate: Fraction) -> int:
    """Bits of the indices of a layer."""
    return math.ceil(layer.n * layer.k * rate)


def latency_costs(rows: Iterable[Mapping[str, Any]], m: int) -> dict[tuple[int, int, str], int]:
    """{(n, k, grid): nanoseconds} from measured rows with the keys n, k, grid, m and us, those of ``m`` tokens."""
    return {(int(r["n"]), int(r["k"]), str(r["grid"])): math.ceil(1000 * r["us"]) for r in rows if int(r["m"]) == m}


def tied_groups(names: Sequence[str]) -> list[int]:
    """For every layer the number of its group: q/k/v of one attention and gate/up of one MLP share one."""
    numbers: dict[tuple[str, object], int] = {}
    groups = []
    for name in names:
        parent, _, last = name.rpartition(".")
        kind = next((i for i, tied in enumerate(_TIED) if last in tied), last)
        groups.append(numbers.setdefault((parent, kind), len(numbers)))
    return groups


def plan_allocation(
    sensitivities: Sensitivities,
    *,
    bits: float | None = None,
    size: int | None = None,
    latency_us: float | None = None,
    latencies: Mapping[tuple[int, int, str], int] | None = None,
    menu: Sequence[MenuGrid] | None = None,
    untie: bool = False,
    fixed: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    index_bits_only: bool = False,
    column_scales: bool | None = None,
    block: int | None = None,
    group: int | None = None,
    low_rate: bool = False,
) -> Allocation:
    """The allocation of least predicted loss under exactly one budget: ``bits`` a weight over all layers that are not
    skipped, ``size`` in bytes, or ``latency_us`` with ``latencies`` (:func:`latency_costs`).

    ``fixed`` maps regular expressions to grids, ``skip`` lists regular expressions of layers to leave out (they count
    nowhere). Unless ``untie``, layers of one group (:func:`tied_groups`) get one grid. Bits count scales, and column
    scales where a layer has one (``column_scales`` overrides that), unless ``index_bits_only``.

    ``menu``: by default the grids of the library from 2 bits on. For a budget in bits or bytes that these cannot meet,
    those below 2 bits too, and then with ``low_rate``, the low-rate correction (:func:`corrected`), in any case.

    Raises ValueError for bad arguments, and for a budget out of reach, naming the feasible range.
    """
    if sum(budget is not None for budget in (bits, size, latency_us)) != 1:
        raise ValueError("give exactly one budget: bits, bytes or latency")
    layers, skipped = _eligible(sensitivities.layers, compiled("skip", skip))
    rule = _SizeRule(index_bits_only, column_scales, block, group)
    weights = sum(x.n * x.k for x in layers)
    groups = list(range(len(layers))) if untie else tied_groups([x.name for x in layers])

    def tables(menu: list[MenuGrid]) -> tuple[list[list[int]], list[int]]:
        return [[rule.bits(x, g) for g in menu] for x in layers], _fixed_choices(layers, menu, fixed or {})

    chosen = _usual_menu(fixed or {}) if menu is None else list(menu)
    sizes, choices = tables(chosen)
    if latency_us is not None:
        costs, budget, unit = _latencies_of(layers, chosen, latencies or {}), math.floor(1000 * latency_us), "ns"
    else:
        budget, unit = _bit_budget(bits, weights) if size is None else 8 * size, "bits"
        if menu is None and _range(sizes, groups, choices)[0] > budget:
            chosen, low_rate = grid_menu(), True
            sizes, choices = tables(chosen)
        costs = sizes
    _check_feasible(_range(costs, groups, choices), budget, unit, weights)
    items = [
        [
            (cost, max(x.alpha, 0.0) * (corrected(g.t2, rule.scaled(x)) if low_rate else g.t2))
            for cost, g in zip(row, chosen, strict=True)
        ]
        for x, row in zip(layers, costs, strict=True)
    ]
    found = _core.allocate(items, budget, group=groups, fixed=choices)

    planned = _planned(layers, chosen, sizes, found.choice)
    negative = [x.name for x in layers if x.alpha < 0]
    base, error_of_sum = sensitivities.base_perplexity, sensitivities.relative_error
    predicted = sum(x.loss for x in planned)
    first_order = sum(x.first_order * p.t2 for x, p in zip(layers, planned, strict=True))
    return Allocation(
        bits=sum(row[c] for row, c in zip(sizes, found.choice, strict=True)) / weights,
        cost=found.cost, budget=budget, unit=unit, objective="corrected" if low_rate else "linear",
        predicted_loss=predicted + first_order,
        corrected_loss=first_order + sum(
            max(x.alpha, 0.0) * corrected(p.t2, rule.scaled(x)) for x, p in zip(layers, planned, strict=True)
        ),
        gap=found.gap, layers=planned, skipped=skipped,
        notes=[f"{len(negative)} negative sensitivities count as 0: {', '.join(negative)}"] if negative else [],
        predicted_perplexity=None if base is None else base * math.exp(found.loss + first_order),
        predicted_error=None if error_of_sum is None else error_of_sum * predicted,
        first_order=first_order,
    )  # fmt: skip


def _planned(
    layers: Sequence[LayerSensitivity], menu: Sequence[MenuGrid], sizes: list[list[int]], choices: Sequence[int]
) -> list[PlannedLayer]:
    return [
        PlannedLayer(x.name, x.n, x.k, menu[c].name, row[c] / (x.n * x.k), x.alpha, menu[c].t2,
                     max(x.alpha, 0.0) * menu[c].t2)
        for x, row, c in zip(layers, sizes, choices, strict=True)
    ]  # fmt: skip


@dataclass(frozen=True)
class _SizeRule:
    """What counts as the bits of a layer."""

    index_bits_only: bool
    column_scales: bool | None  # None: as each layer says
    block: int | None
    group: int | None

    def bits(self, x: LayerSensitivity, grid: MenuGrid) -> int:
        if self.index_bits_only:
            return index_bits(x, grid.rate)
        return stored_bits(x, grid.rate, self.scaled(x), block=self.block, group=self.group)

    def scaled(self, x: LayerSensitivity) -> bool:
        """Whether the layer has, or will have, a column scale."""
        return x.column_scale if self.column_scales is None else self.column_scales


def _usual_menu(fixed: Mapping[str, str]) -> list[MenuGrid]:
    """The grids from 2 bits on, and those that layers are ``fixed`` to."""
    return [g for g in grid_menu() if g.rate >= LOWEST_USUAL_RATE or g.name in fixed.values()]


def _eligible(
    layers: Iterable[LayerSensitivity], skip: list[Pattern[str]]
) -> tuple[list[LayerSensitivity], dict[str, str]]:
    kept, skipped = [], {}
    for x in layers:
        if any(pattern.search(x.name) for pattern in skip):
            skipped[x.name] = "excluded"
        elif x.k % 64:
            skipped[x.name] = f"k = {x.k} is not a multiple of 64"
        else:
            kept.append(x)
    if not kept:
        raise ValueError("no layer is left to allocate bits to")
    return kept, skipped


def _bit_budget(bits: float | None, weights: int) -> int:
    """Whole bits for ``bits`` a weight, taken as the decimal number that was written."""
    if bits is None or not math.isfinite(bits) or bits <= 0:
        raise ValueError(f"bits {bits} is not supported; use a positive number of bits a weight")
    return math.floor(Fraction(str(bits)) * weights)


def _latencies_of(
    layers: Sequence[LayerSensitivity], menu: Sequence[MenuGrid], latencies: Mapping[tuple[int, int, str], int]
) -> list[list[int]]:
    missing = {(x.n, x.k, g.name) for x in layers for g in menu} - latencies.keys()
    if missing:
        n, k, grid = min(missing)
        raise ValueError(f"the latency table has no time for {len(missing)} combinations, e.g. {n}x{k} on {grid}")
    return [[latencies[x.n, x.k, g.name] for g in menu] for x in layers]


def _fixed_choices(layers: Sequence[LayerSensitivity], menu: list[MenuGrid], fixed: Mapping[str, str]) -> list[int]:
    """The position in the menu that each layer is fixed to, -1 for none."""
    position = {g.name: i for i, g in enumerate(menu)}
    choices = [-1] * len(layers)
    for pattern, grid in fixed.items():
        if grid not in position:
            raise ValueError(
                f"layers {pattern!r} are fixed to {grid!r}, which is not in the menu: {', '.join(position)}"
            )
        (expression,) = compiled("fix", [pattern])
        matches = [i for i, x in enumerate(layers) if expression.search(x.name)]
        if not matches:
            raise ValueError(f"no layer matches {pattern!r}, which is fixed to {grid}")
        for i in matches:
            choices[i] = position[grid]
    return choices


def _range(costs: list[list[int]], groups: list[int], choices: list[int]) -> tuple[int, int]:
    """Costs of the cheapest and of the dearest allocation."""
    sums: dict[int, list[int]] = {}
    allowed: dict[int, int] = {}
    for row, group, choice in zip(costs, groups, choices, strict=True):
        sums[group] = [a + b for a, b in zip(sums.get(group, [0] * len(row)), row, strict=True)]
        allowed[group] = max(choice, allowed.get(group, -1))
    options = [[row[allowed[g]]] if allowed[g] >= 0 else row for g, row in sums.items()]
    return sum(map(min, options)), sum(map(max, options))


def _check_feasible(feasible: tuple[int, int], budget: int, unit: str, weights: int) -> None:
    """ValueError with the range if not even the cheapest allocation is within the budget."""
    low, high = feasible
    if budget < low:
        scale, name = (1000, "us") if unit == "ns" else (weights, "bits a weight")
        raise ValueError(
            f"the budget of {budget / scale:.4f} {name} ({budget} {unit}) is out of reach; this menu allows "
            f"{math.ceil(1e4 * low / scale) / 1e4:.4f} to {high / scale:.4f} {name} ({low} to {high} {unit})"
        )
