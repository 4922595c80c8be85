"""Make the MSE-optimal Gaussian quantization grids of higgs and write them to cpp/src/grid_data.cpp.

A grid is a set of n points in R^p.  It is MSE-optimal when it minimizes t2 = E||x - Q(x)||^2 / p for x ~ N(0, I_p), Q
being the map to the nearest point.  HIGGS rounds Hadamard-rotated weights to such grids (arXiv 2411.17525, "Pushing the
Limits of Large Language Model Quantization via the Linearity Theorem", on Gaussian MSE-optimal grids; the paper takes
them from CLVQ, the stochastic form of Lloyd's iteration, after Pages and Printems).

The objective and its gradient, 2 (P_i q_i - m_i) with P_i the mass and m_i the first moment of the cell of q_i, are
computed here without sampling where that is possible:

  p = 1  Lloyd-Max: cells from the normal CDF, Lloyd steps and then Newton steps to machine precision.
  p = 2  Exact cells: by the divergence theorem P_i and m_i are sums over the Voronoi edges of Owen's T function and of
         normal CDF differences.  L-BFGS from several starts (companded hexagonal lattice, sunflower spiral, random),
         then many "delete one point, split another cell" moves, each relaxed by L-BFGS and kept only if t2 falls.
  p = 4  Over-relaxed Lloyd steps on scrambled Sobol points: random starts, delete/split moves, then larger samples.
         A sign-symmetric grid is its magnitudes, points for |x|, with every choice of signs: only they are made.
  ch8    Uniform points (i - 127.5) * step, i = 0..255, with the MSE-optimal power-of-two step for N(0, 1).

At the end every coordinate is rounded to the nearest fp16 value (the GPU tables hold halves). Those of the grids that
GPU kernels look up four weights at a time are rounded further, to a multiple of 1/32, in a sign-symmetric grid to an
odd one of 1/64: a signed byte. That costs 0.01-0.12 % of t2, and Lloyd steps on that lattice win nothing back. t2 is
that of the rounded points: closed form for p = 1 and 2, and for p = 4 the mean over independent scrambled Sobol
samples never used to fit (standard error about 0.003 %). --check recomputes p = 2 another way, by quadrature on a
dense lattice.

Every grid has its own random stream, made of (seed, p, n), so --only gives the same points as a whole run, and a run
gives the same bytes again on the same machine and library versions.  A whole run takes about 21 minutes on one core.

    OMP_NUM_THREADS=1 python cpp/grids/make_grids.py                   # everything
    OMP_NUM_THREADS=1 python cpp/grids/make_grids.py --only p2_n256    # remake one grid, keep the others of the file
    OMP_NUM_THREADS=1 python cpp/grids/make_grids.py --check           # recompute every t2; exit 1 if one misses

Needs numpy and scipy.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded  # type: ignore[import-untyped]
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.spatial import Voronoi, cKDTree  # type: ignore[import-untyped]
from scipy.special import ndtr, ndtri, owens_t  # type: ignore[import-untyped]
from scipy.stats import qmc  # type: ignore[import-untyped]

Array = NDArray[np.float64]
Cells = tuple[Array, Array]  # mass P_i [n], first moment m_i [n, p]

OUTPUT = Path(__file__).resolve().parents[1] / "src" / "grid_data.cpp"
TOLERANCE = 1.005  # a grid passes --check when t2 <= TOLERANCE * target
BYTE_STEP = 1.0 / 32.0


class Spec(NamedTuple):
    """What to make: dimension, size, the t2 that a good grid reaches, the numbers of starts and of moves, and the step
    that coordinates are multiples of (0: any fp16 value). A sign-symmetric grid is made of n / 2^p magnitudes, whose
    coordinates are odd multiples of half the step: a byte u stands for (u + 1/2) * step, and ~u for minus that."""

    p: int
    n: int
    target: float
    starts: int = 0
    moves: int = 0
    step: float = 0.0
    symmetric: bool = False

    @property
    def rows(self) -> int:
        """How many points are made and stored."""
        return self.n >> self.p if self.symmetric else self.n


class Grid(NamedTuple):
    """Points as stored (fp16 values, in final order) and their t2."""

    points: Array
    t2: float


SPECS: dict[str, Spec] = {
    "p1_n4": Spec(1, 4, 0.1175, step=BYTE_STEP),
    "p1_n8": Spec(1, 8, 0.03455),
    "p1_n16": Spec(1, 16, 0.00950),
    "p1_n32": Spec(1, 32, 0.002505),
    "p1_n64": Spec(1, 64, 0.000644),
    "p1_n256": Spec(1, 256, 0.0000413),
    "p2_n16": Spec(2, 16, 0.1076, 60, 60, BYTE_STEP),
    "p2_n32": Spec(2, 32, 0.0571, 240, 300),
    "p2_n64": Spec(2, 64, 0.0296, 300, 400),
    "p2_n128": Spec(2, 128, 0.0152, 90, 600),
    "p2_n256": Spec(2, 256, 0.00775, 30, 900),
    "p2_n512": Spec(2, 512, 0.0039, 12, 200),
    "p2_n1024": Spec(2, 1024, 0.001975, 9, 100),
    "p2_n2048": Spec(2, 2048, 0.000993, 6, 40),
    "p2_n4096": Spec(2, 4096, 0.000499, 3, 20),
    "p4_n16": Spec(4, 16, 0.342, 60, 300, BYTE_STEP),
    "p4_n64": Spec(4, 64, 0.184, 30, 500, BYTE_STEP),
    "p4_n256": Spec(4, 256, 0.0970, 12, 500, BYTE_STEP),
    "p4_n4096": Spec(4, 4096, 0.0262, 12, 500, BYTE_STEP, symmetric=True),
    "ch8": Spec(1, 256, 0.0000881),
}


def distortion(q: Array, cells: Cells) -> float:
    """t2 from the cells: E|x - q|^2 = E|x|^2 - 2 sum q.m + sum |q|^2 P, over p."""
    mass, moment = cells
    return float(q.shape[1] - 2.0 * (q * moment).sum() + ((q * q).sum(1) * mass).sum()) / q.shape[1]


def density(x: Array) -> Array:
    """The standard normal density."""
    return np.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)


def normal_between(lo: Array, hi: Array) -> Array:
    """P(lo < x < hi) for x ~ N(0, 1), without cancellation in the upper tail."""
    flip = lo > 0
    return ndtr(np.where(flip, -lo, hi)) - ndtr(np.where(flip, -hi, lo))


def cells_1d(q: Array) -> Cells:
    """Exact cells of ascending points q [n, 1]."""
    x = q[:, 0]
    edges = np.concatenate([[-np.inf], 0.5 * (x[1:] + x[:-1]), [np.inf]])
    lo, hi = edges[:-1], edges[1:]
    return normal_between(lo, hi), (density(lo) - density(hi))[:, None]


def lloyd_max(n: int) -> Array:
    """The Lloyd-Max quantizer of N(0, 1): Lloyd steps, with Newton steps wherever these lower the distortion."""
    x = np.sqrt(3.0) * ndtri((np.arange(n) + 0.5) / n)  # the asymptotically optimal density is that of N(0, 3)
    for _ in range(500):
        for _ in range(20):
            mass, moment = cells_1d(x[:, None])
            x = moment[:, 0] / mass
        mass, moment = cells_1d(x[:, None])
        off = 0.25 * density(0.5 * (x[1:] + x[:-1])) * np.diff(x)  # minus the off-diagonal of half the Hessian
        band = np.zeros((3, n))
        band[0, 1:], band[2, :-1], band[1] = -off, -off, mass
        band[1, :-1] -= off
        band[1, 1:] -= off
        newton = x - solve_banded((1, 1), band, x * mass - moment[:, 0])
        newton = 0.5 * (newton - newton[::-1])
        if np.all(np.diff(newton) > 0):
            change = float(np.abs(newton - x).max())
            if distortion(newton[:, None], cells_1d(newton[:, None])) < distortion(x[:, None], (mass, moment)) + 1e-15:
                x = newton
                if change < 1e-12:
                    return x[:, None]
    raise RuntimeError(f"Lloyd-Max did not converge for n = {n}")


def uniform_grid(n: int) -> Array:
    """Uniform points, symmetric about 0, with the MSE-optimal step that keeps every point exact in fp16.

    The points are odd multiples of half a step: with 8 bits and more they are exact only if the step is a power of two,
    which costs 0.4 % of t2 at n = 256 against the free optimum, and lets integer kernels use the index as the value.
    """
    k = (np.arange(n) - 0.5 * (n - 1))[:, None]
    return min((2.0**-e * k for e in range(12)), key=lambda q: distortion(q, cells_1d(q)))


def cells_2d(q: Array) -> Cells:
    """Exact cells of points q [n, 2] under N(0, I_2).

    An edge between cells i and j lies on the line x.u = h, u the unit vector from q_i to q_j, and runs from lo to hi
    along the tangent.  With div(phi(x) e) = -x.e phi(x), the first moment of a cell is minus the sum over its edges of
    (outward normal) * phi(h) * (Phi(hi) - Phi(lo)).  The mass over the triangle or strip from the origin to an edge is
    angle / 2 pi - (T(h, hi/h) - T(h, lo/h)) with Owen's T; around the cell the signed angles sum to 2 pi for the cell
    that holds the origin and to 0 for the others.
    """
    n = len(q)
    vor = Voronoi(q)
    pair = np.sort(vor.ridge_points, axis=1)
    vertex = np.sort(np.asarray(vor.ridge_vertices), axis=1)  # -1, if any, comes first: an edge that goes to infinity
    i, j = pair[:, 0], pair[:, 1]
    step = q[j] - q[i]
    length = np.hypot(step[:, 0], step[:, 1])
    u = step / length[:, None]
    tangent = np.stack([-u[:, 1], u[:, 0]], 1)
    norm2 = (q * q).sum(1)
    h = 0.5 * (norm2[j] - norm2[i]) / length

    infinite = vertex[:, 0] < 0
    end = (vor.vertices[vertex[:, 1]] * tangent).sum(1)
    other = (vor.vertices[vertex[:, 0]] * tangent).sum(1)
    outward = ((0.5 * (q[i] + q[j]) - q.mean(0)) * tangent).sum(1) > 0
    other = np.where(infinite, np.where(outward, np.inf, -np.inf), other)
    lo, hi = np.minimum(end, other), np.maximum(end, other)

    dist = np.abs(h)
    safe = np.maximum(dist, 1e-300)
    with np.errstate(over="ignore"):
        wedge = owens_t(dist, hi / safe) - owens_t(dist, lo / safe)
    wedge = np.where(norm2[j] >= norm2[i], wedge, -wedge)
    mass = np.asarray(np.bincount(j, wedge, n) - np.bincount(i, wedge, n), np.float64)
    mass[np.argmin(norm2)] += 1.0
    flux = (density(h) * normal_between(lo, hi))[:, None] * u
    moment = np.stack([np.bincount(j, flux[:, k], n) - np.bincount(i, flux[:, k], n) for k in range(2)], 1)
    return mass, moment


def relax_2d(q: Array, iterations: int, tolerance: float = 1e-10) -> tuple[Array, float]:
    """L-BFGS from q, on coordinates scaled by sqrt(P_i), which makes the curvature of all points about equal."""
    n = len(q)
    scale = np.sqrt(np.maximum(cells_2d(q)[0], 1e-12))[:, None]

    def objective(y: Array) -> tuple[float, Array]:
        x = y.reshape(n, 2) / scale
        mass, moment = cells_2d(x)
        return n * distortion(x, (mass, moment)), (n * (x * mass[:, None] - moment) / scale).ravel()

    options = {"maxiter": iterations, "maxcor": 10, "ftol": tolerance, "gtol": 1e-9}
    found = minimize(objective, (q * scale).ravel(), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(n, 2) / scale, float(found.fun) / n


def start_2d(n: int, kind: int, rng: np.random.Generator) -> Array:
    """A start of the asymptotically optimal density, that of N(0, 2 I): companded hexagons, a sunflower or random."""
    if kind == 2:
        return np.sqrt(2.0) * rng.standard_normal((n, 2))
    if kind == 1:
        rank = np.arange(n) + rng.random()
        angle = rank * np.pi * (3.0 - np.sqrt(5.0))
    else:  # a hexagonal lattice of unit cell area, the n points nearest to a random origin; pi r^2 is the rank
        side = np.sqrt(2.0 / np.sqrt(3.0))
        reach = int(1.3 * np.sqrt(n / np.pi)) + 3
        a, b = np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1))
        x = np.stack([side * (a + 0.5 * b).ravel(), side * 0.5 * np.sqrt(3.0) * b.ravel()], 1) + rng.random(2)
        x = x[np.argsort((x * x).sum(1))[:n]]
        rank, angle = np.pi * (x * x).sum(1), np.arctan2(x[:, 1], x[:, 0])
        rank *= n / max(float(n), rank.max() * (1.0 + 0.5 / n))
    radius = np.sqrt(-4.0 * np.log1p(-np.minimum(rank, n - 0.5) / n))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def move_point(q: Array, rng: np.random.Generator) -> Array:
    """Delete a random point and split a random other one in two, 0.6 nearest-neighbour distances apart."""
    i, j = rng.choice(len(q), 2, replace=False)
    near = np.sqrt(np.sort(((q - q[j]) ** 2).sum(1))[1])
    way = rng.standard_normal(q.shape[1])
    way *= 0.3 * near / np.linalg.norm(way)
    moved = q.copy()
    moved[i], moved[j] = q[j] + way, q[j] - way
    return moved


def optimize_2d(spec: Spec, rng: np.random.Generator) -> Array:
    """The best of several relaxed starts, then improved by moves of one point."""
    best, least = np.empty((0, 2)), np.inf
    for k in range(spec.starts):
        q = start_2d(spec.n, k % 3, rng)
        for _ in range(5):  # Lloyd steps first: L-BFGS wants a start without nearly empty cells
            mass, moment = cells_2d(q)
            q = moment / np.maximum(mass, 1e-12)[:, None]
        q, value = relax_2d(q, 300)
        if value < least:
            best, least = q, value
    for _ in range(spec.moves):
        q, value = relax_2d(move_point(best, rng), 150)
        if value < least * (1.0 - 1e-9):
            best, least = q, value
    return relax_2d(best, 2000, 1e-15)[0]


def lattice_t2_2d(q: Array, reach: float = 7.0, count: int = 2401) -> float:
    """t2 by the trapezoidal rule on a dense square lattice, with a nearest-point search: the check on cells_2d."""
    axis = np.linspace(-reach, reach, count)
    weight = density(axis) * (axis[1] - axis[0])
    tree, total = cKDTree(q), 0.0
    for x, w in zip(axis, weight, strict=True):
        near = tree.query(np.stack([np.full(count, x), axis], 1))[0]
        total += w * float((near * near * weight).sum())
    return total / 2.0


def gaussian_sample(spec: Spec, log2_count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """2^log2_count scrambled Sobol points, mapped to N(0, I_p), or to |N(0, I_p)| for the magnitudes of a grid."""
    u = qmc.Sobol(spec.p, seed=rng).random_base2(log2_count)
    if spec.symmetric:
        u = 0.5 + 0.5 * u
    return ndtri(np.clip(u, 1e-12, 1.0 - 1e-12)).astype(np.float32)


def cells_sampled(q: Array, x: NDArray[np.float32]) -> Cells:
    """Cells of q [n, p] estimated on the sample x."""
    n, p = q.shape
    points = q.astype(np.float32)
    bias = -0.5 * (points * points).sum(1)
    owner = np.empty(len(x), np.int64)
    scores = np.empty((min(len(x), 4096), n), np.float32)  # sample sizes are powers of two: whole chunks
    for c in range(0, len(x), len(scores)):
        np.matmul(x[c : c + len(scores)], points.T, out=scores)
        np.add(scores, bias, out=scores)
        owner[c : c + len(scores)] = scores.argmax(1)
    moment = np.stack([np.bincount(owner, x[:, k], n) for k in range(p)], 1)
    return np.bincount(owner, minlength=n) / len(x), moment / len(x)


def lloyd_sampled(q: Array, x: NDArray[np.float32], iterations: int, factor: float = 1.5) -> tuple[Array, float]:
    """Over-relaxed Lloyd steps on the sample x; the value is relative to it, so good for comparisons only."""
    for k in range(iterations):
        mass, moment = cells_sampled(q, x)
        centroid = np.where(mass[:, None] > 0, moment / np.maximum(mass, 1e-12)[:, None], q)
        q = q + (factor if k < iterations - 2 else 1.0) * (centroid - q)
    return q, distortion(q, cells_sampled(q, x))


def optimize_sampled(spec: Spec, rng: np.random.Generator) -> Array:
    """The same plan as optimize_2d, on samples."""
    x = gaussian_sample(spec, 17, rng)
    spread = np.sqrt((spec.p + 2.0) / spec.p)  # the asymptotically optimal density is that of N(0, (p + 2) / p I)
    best, least = np.empty((0, spec.p)), np.inf
    for _ in range(spec.starts):
        q = spread * rng.standard_normal((spec.rows, spec.p))
        q, value = lloyd_sampled(np.abs(q) if spec.symmetric else q, x, 80)
        if value < least:
            best, least = q, value
    for _ in range(spec.moves):
        q, value = lloyd_sampled(move_point(best, rng), x, 16)
        if value < least:
            best, least = q, value
    best = lloyd_sampled(best, gaussian_sample(spec, 20, rng), 60)[0]
    return lloyd_sampled(best, gaussian_sample(spec, 23, rng), 12)[0]


def cells_of(q: Array, spec: Spec, seed: int) -> Cells:
    """The most accurate cells for the dimension of q: exact, or averaged over 2^25 fresh sample points."""
    if q.shape[1] <= 2:
        return cells_1d(q) if q.shape[1] == 1 else cells_2d(q)
    rng = np.random.default_rng([seed, 77])
    parts = [cells_sampled(q, gaussian_sample(spec, 22, rng)) for _ in range(8)]
    return np.mean([c[0] for c in parts], axis=0), np.mean([c[1] for c in parts], axis=0)


def to_canonical(q: Array, spec: Spec) -> Array:
    """Round to fp16, then to what the step of the grid allows, and sort lexicographically."""
    rounded = q.astype(np.float16).astype(np.float64)
    if spec.step > 0:
        shift = 0.5 if spec.symmetric else 0.0
        rounded = (np.rint(rounded / spec.step - shift) + shift) * spec.step
    rounded += 0.0  # makes -0.0 plain
    return rounded[np.lexsort(rounded.T[::-1])]


def is_regular(q: Array, spec: Spec) -> bool:
    """Whether q has the shape of the grid, distinct and finite points, and magnitudes are positive and below 4."""
    distinct = q.shape == (spec.rows, spec.p) and len(np.unique(q, axis=0)) == len(q)
    return distinct and bool(np.isfinite(q).all()) and (not spec.symmetric or bool(((q > 0) & (q < 4)).all()))


def make(name: str, seed: int) -> Grid:
    """Optimize, round, sort lexicographically, and measure one grid."""
    spec = SPECS[name]
    rng = np.random.default_rng([seed, spec.p, spec.n])
    if spec.p == 1:
        q = uniform_grid(spec.n) if name == "ch8" else lloyd_max(spec.n)
    else:
        q = optimize_2d(spec, rng) if spec.p == 2 else optimize_sampled(spec, rng)
    q = to_canonical(q, spec)
    if not is_regular(q, spec):
        raise RuntimeError(f"{name}: points not finite, not distinct or not positive after rounding")
    return Grid(q, distortion(q, cells_of(q, spec, seed)))


def literal(x: float) -> str:
    """A C++ float literal of 9 significant digits."""
    text = f"{x:.9g}"
    return text + ("f" if "." in text or "e" in text else ".0f")


def wrap(items: list[str], width: int = 120) -> str:
    """Comma-separated items on lines of at most width characters."""
    lines, line = [], "   "
    for item in items:
        if len(line) + len(item) + 2 > width:
            lines.append(line)
            line = "   "
        line += f" {item},"
    return "\n".join([*lines, line])


def render(grids: dict[str, Grid], seed: int) -> str:
    """The text of grid_data.cpp."""
    names = [name for name in SPECS if name in grids]
    command = f"OMP_NUM_THREADS=1 python cpp/grids/make_grids.py --seed {seed}"
    out = [
        f"// Generated by cpp/grids/make_grids.py; regenerate: {command}",
        "// MSE-optimal grids for N(0, I_p); coordinates are fp16 values; t2 is the mean squared error per weight.",
        '#include "grid_data.h"\n\nnamespace higgs::detail {\nnamespace {\n',
    ]
    for name in names:
        out.append(f"constexpr float k_{name}[] = {{\n{wrap([literal(x) for x in grids[name].points.ravel()])}\n}};\n")
    out.append("}  // namespace\n\nconst GridData kGridData[] = {")
    for k in names:
        p, n, magnitudes = SPECS[k].p, SPECS[k].n, SPECS[k].rows if SPECS[k].symmetric else 0
        out.append(f'    {{"{k}", {p}, {n}, {magnitudes}, {grids[k].t2:.9g}, k_{k}}},')
    out.append("};\nconst int kGridDataCount = sizeof(kGridData) / sizeof(kGridData[0]);\n")
    out.append("}  // namespace higgs::detail\n")
    return "\n".join(out)


def parse(text: str) -> dict[str, Grid]:
    """The grids of a grid_data.cpp written by render."""
    grids = {}
    for name, p, t2 in re.findall(r'\{"(\w+)", (\d+), \d+, \d+, ([-+.\de]+), k_\w+\}', text):
        found = re.search(rf"k_{name}\[\] = {{(.*?)}};", text, re.DOTALL)
        if found is None:
            raise ValueError(f"no array for {name}")
        values = np.array([v.strip().rstrip("f") for v in found.group(1).split(",") if v.strip()]).astype(np.float32)
        grids[name] = Grid(values.astype(np.float64).reshape(-1, int(p)), float(t2))
    return grids


def check(grids: dict[str, Grid], names: list[str], seed: int) -> bool:
    """Recompute t2 of the named grids, independently of how they were made, and print a table."""
    good = True
    print(f"{'grid':10}{'t2 stored':>15}{'t2 checked':>15}{'target':>12}{'ratio':>9}{'|mean|':>10}{'xq/qq-1':>10}")
    for name in names:
        spec = SPECS[name]
        q, stored = grids[name]
        mass, moment = cells_of(q, spec, seed + 1)
        t2 = lattice_t2_2d(q) if spec.p == 2 else distortion(q, (mass, moment))
        mean = float(np.linalg.norm(mass @ q - moment.sum(0)))
        slope = float((q * moment).sum() / ((q * q).sum(1) * mass).sum() - 1.0)
        ratio = t2 / spec.target
        shape = is_regular(q, spec)
        form = np.array_equal(q, to_canonical(q, spec))
        still = max(1e-3, spec.step / 8.0)  # points on a lattice are not quite where t2 is stationary
        fine = ratio <= TOLERANCE and abs(t2 / stored - 1) < 3e-4 and mean < still and abs(slope) < still
        row = f"{name:10}{stored:15.9g}{t2:15.9g}{spec.target:12.4g}{ratio:9.4f}{mean:10.1e}{slope:10.1e}"
        print(row + ("" if fine and shape and form else "  MISS"), flush=True)
        good = good and fine and shape and form
    return good


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the MSE-optimal Gaussian grids (see the docstring).")
    parser.add_argument("--only", action="append", choices=list(SPECS), help="only this grid (may be repeated)")
    parser.add_argument("--check", action="store_true", help="recompute the t2 of the existing file, make nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    names: list[str] = args.only or list(SPECS)
    grids = parse(args.output.read_text()) if args.output.exists() and (args.check or args.only) else {}
    if args.check:
        return 0 if check(grids, names, args.seed) else 1
    for name in names:
        begin = time.perf_counter()
        grids[name] = make(name, args.seed)
        t2, took = grids[name].t2, time.perf_counter() - begin
        print(f"{name}: t2 {t2:.9g}, {t2 / SPECS[name].target:.4f} of the target, {took:.1f} s", flush=True)
    args.output.write_text(render(grids, args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
