"""One kernel while it is tuned, by pytest-benchmark: every benchmark is a name to select, save and compare.

    cmake --build BUILD --target higgs_cuda_bench
    export HIGGS_CUDA_BENCH=BUILD/cuda/libhiggs_cuda_bench.so
    pytest bench/python/test_speed.py -k "cuda and 8b_o and p2_n256" --benchmark-save before
    pytest bench/python/test_speed.py -k "cuda and 8b_o and p2_n256" --benchmark-compare

A round of a CUDA benchmark is a graph of dependent launches over cold weights (bench_kernels.py); `us` in its extra
information (--benchmark-verbose, the saved JSON) is the median of a call. Those of the CPU are single calls.
"""

import os
import sys

import bench_cpu
import pytest
import torch
from bench_kernels import Kernels, captured, graph_us, linear_calls, tiled_copies, warm_up
from shapes import BITS, MAIN, SHAPES

LIBRARY = os.environ.get("HIGGS_CUDA_BENCH")
GRIDS = (*BITS.values(), "a2_b8", "a2_b6", "a2_b4")


@pytest.mark.skipif(LIBRARY is None or not torch.cuda.is_available(), reason="needs HIGGS_CUDA_BENCH and a GPU")
@pytest.mark.parametrize("m", [1, 8, 16, 64, 256, 1024])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", MAIN)
def test_cuda_linear(benchmark, shape: str, grid: str, m: int) -> None:
    kernels = Kernels(str(LIBRARY))
    ns, k = SHAPES[shape]
    calls = linear_calls(kernels, grid, ns, k, m, torch.bfloat16, tiled_copies(kernels, grid, ns, k))
    graph = captured(calls)
    warm_up(graph)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=30)
    benchmark.extra_info["us"] = graph_us(calls)


@pytest.mark.parametrize("grid", ("p1_n16", "p4_n4096", "p2_n64", "p2_n256", "p4_n256", "a2_b6"))
def test_cpu_linear(benchmark, grid: str) -> None:
    calls = bench_cpu.linear_calls(grid, 4096, 4096, 1)
    cold = iter(range(sys.maxsize))
    benchmark.pedantic(lambda: calls[next(cold) % len(calls)](), rounds=40, warmup_rounds=len(calls))


@pytest.mark.parametrize("grid", ("p2_n256", "p4_n256", "p4_n4096", "p2_n4096"))
def test_cpu_quantize(benchmark, grid: str) -> None:
    benchmark.pedantic(bench_cpu.quantize_call(grid, 4096, 4096), rounds=5, warmup_rounds=1)
