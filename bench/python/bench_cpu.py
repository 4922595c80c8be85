"""CPU speed: quantize throughput, and y = x W^T for m rows of x against torch, all in one run on this machine.

    python bench/python/bench_cpu.py [--n 4096] [--k 4096] [--m 1] [--threads 1 2]

Weights are rotated through enough copies to be larger than the last-level cache; median of the calls.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import higgs
import torch
from higgs import _core, _ops

COPIES_BYTES = 600e6


def median_ms(calls: list[Callable[[], object]], repeats: int = 40) -> float:
    times = []
    for i in range(repeats + len(calls)):
        start = time.perf_counter()
        calls[i % len(calls)]()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[len(calls) :])


def quantize_call(grid: str, n: int, k: int) -> Callable[[], object]:
    weight = torch.randn(n, k)
    fmt = higgs.layer_format(n, k, grid)
    _ops.quantize(weight[:8], fmt.with_rows(8))  # builds the search table
    return lambda: _ops.quantize(weight, fmt)


def bench_quantize(grid: str, n: int, k: int) -> float:
    """Million weights a second, in memory, from fp32."""
    return n * k / median_ms([quantize_call(grid, n, k)], 5) / 1e3


def linear_calls(grid: str, n: int, k: int, m: int) -> list[Callable[[], object]]:
    """Each call with another copy of the weights."""
    fmt = higgs.layer_format(n, k, grid)
    indices, scales, _ = _ops.quantize(torch.randn(n, k), fmt)
    copies = [(indices.clone(), scales.clone()) for _ in range(max(2, int(COPIES_BYTES / indices.numel())))]
    x = torch.randn(m, k, dtype=torch.bfloat16)
    args = (fmt.grid, fmt.block, fmt.group, fmt.seed)
    return [lambda c=c: _ops.linear(x, *c, None, None, *args) for c in copies]


def bench_torch(dtype: torch.dtype, n: int, k: int, m: int) -> float:
    weight = torch.randn(n, k).to(dtype)
    copies = [weight.clone() for _ in range(max(2, int(COPIES_BYTES / (weight.numel() * weight.element_size()))))]
    x = torch.randn(m, k).to(dtype)
    return median_ms([lambda w=w: torch.nn.functional.linear(x, w) for w in copies])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--m", type=int, default=1, help="rows of x")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, _core.num_threads()])
    args = parser.parse_args()
    print(f"{_core.current_isa()}, torch {torch.__version__}")
    for grid in ("p1_n16", "p2_n64", "p2_n256", "p2_n4096", "p4_n256", "p4_n4096"):
        print(f"quantize {grid}: {bench_quantize(grid, args.n, args.k):.0f} million weights/s")
    with torch.inference_mode():
        for threads in args.threads:
            torch.set_num_threads(threads)
            _core.set_num_threads(threads)
            fp32, bf16 = (bench_torch(dtype, args.n, args.k, args.m) for dtype in (torch.float32, torch.bfloat16))
            print(f"m = {args.m}, {args.n} x {args.k}, {threads} threads: torch fp32 {fp32:.3f} ms, bf16 {bf16:.3f} ms")
            for grid in ("p1_n16", "p4_n4096", "p2_n64", "p2_n256", "p2_n1024", "p4_n256", "p1_n256"):
                ms = median_ms(linear_calls(grid, args.n, args.k, args.m))
                print(f"  {grid:9} {ms:.3f} ms, {fp32 / ms:.1f} x fp32, {bf16 / ms:.1f} x bf16")


if __name__ == "__main__":
    main()
