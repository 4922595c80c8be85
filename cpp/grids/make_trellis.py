"""Make the tables of the trellis grids of higgs, measure their t2 and write cpp/src/trellis_data.cpp.

A step of a trellis grid appends b bits to a stream and yields V weights, a function of L neighbouring bits (the
"window"); a Viterbi search finds the best stream (QTIP, arXiv 2406.11235, has the idea; see cpp/FORMAT.md for ours).
Two kinds of functions, both trained here: windows are assigned to a Gaussian sample by the search, then the entries of
the table are fitted to it by least squares, over and over.

  hash      t{V}_b{b}: the window times an odd constant selects a row of magnitudes and V signs. L = 16.
  additive  a{V}_b{b}: the sum of two rows, of the first and of the last 8 bits of the window. L = b + 8, or 2 b + 8.

    OMP_NUM_THREADS=1 python cpp/grids/make_trellis.py                     # everything, an hour on one core
    OMP_NUM_THREADS=1 python cpp/grids/make_trellis.py --only a2_b8        # remake one table and measure its grids
    OMP_NUM_THREADS=1 python cpp/grids/make_trellis.py --measure           # only measure, and print
    OMP_NUM_THREADS=1 python cpp/grids/make_trellis.py --study             # why these: multipliers, sizes, run lengths

Needs numpy and g++ (compiles viterbi.cpp).
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from make_grids import literal, wrap
from numpy.typing import NDArray

Array = NDArray[np.float32]

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "src" / "trellis_data.cpp"
RUN = {"hash": 512, "additive": 64}  # weights
MULTIPLIER = 0x9E3779B1
# Additive entries are such that any two add up to a signed byte times 1/32: GPUs multiply the sums as integers. Tables
# trained within this range are as good as without it, or better.
LATTICE = 32.0
ADDITIVE_RANGE = (-64 / LATTICE, 63 / LATTICE)


class Spec(NamedTuple):
    """A table and the grids that use it."""

    kind: str
    weights: int  # V
    rows: int
    trained_at: int  # step bits
    rates: tuple[int, ...]  # step bits of its grids
    more: tuple[tuple[int, int], ...] = ()  # training after that of its kind: weights, rounds


SPECS = {
    # 0.9 % better than with the table of the others, 0.15 % of it by training on more weights
    "t2_b4": Spec("hash", 2, 1024, 4, (4,), ((1 << 22, 10), (1 << 23, 5))),
    "t2": Spec("hash", 2, 1024, 8, (5, 6, 7, 8, 9, 10)),
    "t4": Spec("hash", 4, 256, 8, (6, 8)),
    "a2_b4": Spec("additive", 2, 256, 4, (4,)),
    "a2_b5": Spec("additive", 2, 256, 5, (5,)),
    "a2_b6": Spec("additive", 2, 256, 6, (6,)),
    "a2_b7": Spec("additive", 2, 256, 7, (7,)),
    "a2_b8": Spec("additive", 2, 256, 8, (8,)),
}


def grid_name(table: str, bits: int) -> str:
    """The name of the grid of `bits` a step that uses the table."""
    return table if "_" in table else f"{table}_b{bits}"


def window_bits(spec: Spec, bits: int) -> int:
    """L."""
    return 16 if spec.kind == "hash" else shift(bits) * bits + 8


def shift(bits: int) -> int:
    """Steps between the two pieces of an additive window: more states where a step adds few bits."""
    return 2 if bits == 4 else 1


class Viterbi:
    """viterbi.cpp, compiled for this machine."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = f"{folder}/viterbi.so"
            flags = ["-std=c++20", "-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
            subprocess.run(["g++", *flags, str(HERE / "viterbi.cpp"), "-o", library], check=True)
            self.library = ctypes.CDLL(library)

    def encode(self, x: Array, length: int, bits: int, points: Array) -> NDArray[np.uint32]:
        """Windows [runs, steps] of x [runs, columns], with points [2^length, V]."""
        runs, columns = x.shape
        weights = points.shape[1]
        windows = np.empty((runs, columns // weights), np.uint32)
        pointer = ctypes.c_void_p
        self.library.encode(
            pointer(x.ctypes.data), runs, columns, length, bits, weights, pointer(points.ctypes.data), -(-192 // bits),
            pointer(windows.ctypes.data),
        )  # fmt: skip
        return windows


def gaussian(weights: int, run: int, seed: int) -> Array:
    """Runs of N(0, 1) weights whose mean square is exactly 1, which takes most of the sampling noise out of t2."""
    x = np.random.default_rng(seed).standard_normal((weights // run, run)).astype(np.float32)
    return x / np.sqrt((x.astype(np.float64) ** 2).mean()).astype(np.float32)


def hash_of(length: int, rows: int, weights: int, multiplier: int = MULTIPLIER) -> tuple[NDArray[np.int64], Array]:
    """Row [2^length] and signs [2^length, V] of every window."""
    h = np.arange(1 << length, dtype=np.uint64) * np.uint64(multiplier) & np.uint64(0xFFFFFFFF)
    negative = np.stack([h >> np.uint64(bit) & np.uint64(1) for bit in (15, 31, 14, 30)[:weights]], 1)
    return (h >> np.uint64(16)).astype(np.int64) % rows, 1 - 2 * negative.astype(np.float32)


def expand(spec: Spec, table: Array, bits: int) -> Array:
    """The points [2^L, V] of all windows."""
    length = window_bits(spec, bits)
    if spec.kind == "hash":
        row, sign = hash_of(length, spec.rows, spec.weights)
        return table[row] * sign
    window = np.arange(1 << length)
    return table[window & 255, : spec.weights] + table[window >> (length - 8), spec.weights :]


def k_means(rows: int, weights: int, rng: np.random.Generator) -> Array:
    """Magnitudes to start from: k-means on half-normal vectors."""
    x = np.abs(rng.standard_normal((60000, weights))).astype(np.float32)
    table = x[:rows].copy()
    for _ in range(25):
        owner = np.argmin((table * table).sum(1) - 2 * x @ table.T, axis=1)
        count = np.bincount(owner, minlength=rows)[:, None]
        total = np.stack([np.bincount(owner, x[:, v], rows) for v in range(weights)], 1)
        table = np.where(count > 0, total / np.maximum(count, 1), table).astype(np.float32)
    return table


def fit_hash(spec: Spec, table: Array, x: Array, windows: NDArray[np.uint32]) -> Array:
    """The mean, per row, of the weights with the window's signs taken off."""
    row, sign = hash_of(16, spec.rows, spec.weights)
    flat = windows.ravel()
    y = x.reshape(-1, spec.weights) * sign[flat]
    count = np.bincount(row[flat], minlength=spec.rows)[:, None]
    total = np.stack([np.bincount(row[flat], y[:, v], spec.rows) for v in range(spec.weights)], 1)
    return ((total + table) / (count + 1)).astype(np.float32)


def fit_additive(spec: Spec, table: Array, x: Array, windows: NDArray[np.uint32], bits: int) -> Array:
    """Least squares for both columns of rows at once, held lightly at the old values."""
    flat = windows.ravel().astype(np.int64)
    first, last = flat & 255, (flat >> shift(bits) * bits) + 256
    count = np.zeros((512, 512))
    for i, j in ((first, first), (last, last), (first, last), (last, first)):
        count += np.bincount(i * 512 + j, minlength=512 * 512).reshape(512, 512)
    y = x.reshape(-1, spec.weights).astype(np.float64)
    total = np.stack([np.bincount(first, v, 512) + np.bincount(last, v, 512) for v in y.T], 1)
    old = np.concatenate([table[:, : spec.weights], table[:, spec.weights :]]).astype(np.float64)
    new = old + np.linalg.solve(count + 1e-3 * len(y) / 256 * np.eye(512), total - count @ old)
    return np.concatenate([new[:256], new[256:]], 1).astype(np.float32)


def rounded(spec: Spec, table: Array) -> Array:
    """The table as stored: fp16 values, on a lattice where sums must be exact."""
    if spec.kind == "hash":
        return table.astype(np.float16).astype(np.float32)
    return np.round(table * np.float32(LATTICE)) / np.float32(LATTICE) + np.float32(0)


def train(spec: Spec, viterbi: Viterbi, name: str, seed: int) -> Array:
    """Alternate searches and fits, over-relaxed, on larger and larger samples."""
    rng = np.random.default_rng([seed, *name.encode()])
    if spec.kind == "hash":
        table, plan = k_means(spec.rows, spec.weights, rng), [(1 << 18, 10), (1 << 21, 6)]
    else:
        table = (np.sqrt(0.5) * rng.standard_normal((256, 2 * spec.weights))).astype(np.float32)
        plan = [(1 << 18, 40), (1 << 20, 30), (1 << 22, 12)]
    bits = spec.trained_at
    for weights, rounds in (*plan, *spec.more):
        x = gaussian(weights, RUN[spec.kind], int(rng.integers(1 << 31)))
        for k in range(rounds):
            windows = viterbi.encode(x, window_bits(spec, bits), bits, expand(spec, table, bits))
            fit = (
                fit_hash(spec, table, x, windows)
                if spec.kind == "hash"
                else fit_additive(spec, table, x, windows, bits)
            )
            table = table + np.float32(1.6 if k + 2 < rounds else 1.0) * (fit - table)
            if spec.kind == "additive":
                table = np.clip(table, *np.float32(ADDITIVE_RANGE))
        print(f"{name}: t2 {t2_of(spec, table, bits, viterbi, 1 << 17, seed):.5f} after {weights} weights", flush=True)
    return rounded(spec, table)


def t2_of(spec: Spec, table: Array, bits: int, viterbi: Viterbi, weights: int, seed: int) -> float:
    """Measured on fresh runs."""
    x, points = gaussian(weights, RUN[spec.kind], seed + 1000), expand(spec, table, bits)
    windows = viterbi.encode(x, window_bits(spec, bits), bits, points)
    return float(((x - points[windows].reshape(x.shape)).astype(np.float64) ** 2).mean())


def study(tables: dict[str, Array], viterbi: Viterbi) -> None:
    """The measurements behind the choices: 2, 3 and 4 bits, V = 2."""
    spec, table = SPECS["t2"], tables["t2"]
    x = gaussian(1 << 15, 512, 21)

    def row(label: str, points: Array, sample: Array) -> None:
        errors = []
        for bits in (4, 6, 8):
            windows = viterbi.encode(sample, 16, bits, points)
            errors.append(float(((sample - points[windows].reshape(sample.shape)) ** 2).mean()))
        print(f"{label:24}" + "".join(f"{e:10.5f}" for e in errors), flush=True)

    for multiplier in (MULTIPLIER, 0xF1446BEB, 0x9F767C45, 0xC2B2AE35, 0x73CF256D, 0x27D4EB2F):
        index, sign = hash_of(16, spec.rows, 2, multiplier)
        row(f"multiplier {multiplier:#x}", table[index] * sign, x)
    for rows in (256, 512, 1024, 2048):
        index, sign = hash_of(16, rows, 2)
        row(f"{rows} rows, untrained", k_means(rows, 2, np.random.default_rng(0))[index] * sign, x)
    for run in (64, 128, 256, 512, 1024):
        row(f"runs of {run}", expand(spec, table, 8), np.ascontiguousarray(x.reshape(-1, run)))


def render(tables: dict[str, Array], t2: dict[str, float], seed: int) -> str:
    """The text of trellis_data.cpp."""
    command = f"OMP_NUM_THREADS=1 python cpp/grids/make_trellis.py --seed {seed}"
    out = [
        f"// Generated by cpp/grids/make_trellis.py; regenerate: {command}",
        "// Tables of the trellis grids; entries are fp16 values; t2 is measured on Gaussian weights.",
        '#include "grid_data.h"\n\nnamespace higgs::detail {\nnamespace {\n',
    ]
    for name in SPECS:
        values = wrap([literal(float(v)) for v in tables[name].ravel()])
        out.append(f"constexpr float k_{name}[] = {{\n{values}\n}};\n")
    out.append("}  // namespace\n\nconst TrellisData kTrellisData[] = {")
    for name, spec in SPECS.items():
        for bits in spec.rates:
            grid = grid_name(name, bits)
            multiplier = MULTIPLIER if spec.kind == "hash" else 0
            kind = f"Trellis::Kind::{spec.kind}, {window_bits(spec, bits)}, {multiplier:#x}"
            out.append(f'    {{"{grid}", {spec.weights}, {bits}, {t2[grid]:.4g}, {kind}, {spec.rows}, k_{name}}},')
    out.append("};\nconst int kTrellisDataCount = sizeof(kTrellisData) / sizeof(kTrellisData[0]);\n")
    out.append("}  // namespace higgs::detail\n")
    return "\n".join(out)


def parse(text: str) -> tuple[dict[str, Array], dict[str, float]]:
    """The tables of a trellis_data.cpp written by render, and the t2 of their grids."""
    tables = {}
    for name, values in re.findall(r"k_(\w+)\[\] = {(.*?)};", text, re.DOTALL):
        numbers = [v.strip().rstrip("f") for v in values.split(",") if v.strip()]
        tables[name] = np.array(numbers).astype(np.float32).reshape(SPECS[name].rows, -1)
    return tables, {name: float(t2) for name, t2 in re.findall(r'{"(\w+)", \d+, \d+, ([-+.\de]+),', text)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the trellis grids (see the docstring).")
    parser.add_argument("--only", action="append", choices=list(SPECS), help="only this table (may be repeated)")
    parser.add_argument("--measure", action="store_true", help="measure the grids of the existing file, make nothing")
    parser.add_argument("--study", action="store_true", help="print the measurements behind the choices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    viterbi = Viterbi()
    tables, t2 = parse(args.output.read_text()) if args.output.exists() else ({}, {})
    if args.study:
        study(tables, viterbi)
        return 0
    for name in args.only or list(SPECS):
        spec = SPECS[name]
        if not args.measure:
            tables[name] = train(spec, viterbi, name, args.seed)
        for bits in spec.rates:
            grid = grid_name(name, bits)
            t2[grid] = t2_of(spec, tables[name], bits, viterbi, 1 << 19, args.seed)
            print(f"{grid}: t2 {t2[grid]:.5f}", flush=True)
    if not args.measure:
        args.output.write_text(render(tables, t2, args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
