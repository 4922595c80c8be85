"""Times of the projections of experts on a GPU: higgs against bf16 (torch's grouped matmul, and a loop of matmuls).

    python bench/python/bench_experts.py [--grid p2_n256] [--batches 1 4 16 64 256]

Every call meets another random routing, so that the weights come from memory; CUDA graphs, median.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import higgs
import torch
from higgs import _cuda, _grouped

# experts, experts per token, n, k
SHAPES = {
    "Mixtral-8x7B gate_up": (8, 2, 28672, 4096),
    "Mixtral-8x7B down": (8, 2, 4096, 14336),
    "Qwen3-30B-A3B gate_up": (128, 8, 1536, 2048),
    "Qwen3-30B-A3B down": (128, 8, 2048, 768),
}
CALLS = 16  # with another routing each


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Median time of a call, over replays of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / len(calls))
    return sorted(times)[len(times) // 2]


def routing(experts: int, top_k: int, batch: int) -> torch.Tensor:
    chosen = torch.rand(batch, experts).topk(top_k).indices.flatten()
    return torch.bincount(chosen, minlength=experts).cumsum(0).int().cuda()


def bench(name: str, grid: str, batches: list[int]) -> None:
    experts, top_k, n, k = SHAPES[name]
    fmt = higgs.layer_format(experts * n, k, grid)
    weights = torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16)
    indices = torch.randint(256, (fmt.n, fmt.row_bytes), dtype=torch.uint8, device="cuda")
    scales = torch.full((fmt.n, fmt.row_groups), 0.02, dtype=torch.float16, device="cuda")
    tiled, vector = _cuda.repack(indices, scales, fmt), _cuda.input_vector(None, fmt, weights.device)
    del indices, scales
    packed = (tiled, vector, grid, fmt.n, fmt.group, fmt.block)
    for batch in batches:
        line = times(weights, packed, [routing(experts, top_k, batch) for _ in range(CALLS)], batch * top_k)
        print(f"{name:22} {grid} batch {batch:4}: {line}", flush=True)


def times(weights: torch.Tensor, packed: tuple, routings: list[torch.Tensor], rows: int) -> str:
    experts, n, k = weights.shape
    tiled, vector, grid, all_rows, group, block = packed
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
    core, transposed = _cuda._tiled_format(grid, all_rows, k, block, group)[0], weights.transpose(1, 2)
    bounds = [[0, *o.tolist()] for o in routings]

    def loop(ends: list[int]) -> None:
        for e in range(experts):
            if ends[e + 1] > ends[e]:
                torch.mm(x[ends[e] : ends[e + 1]], weights[e].T, out=y[ends[e] : ends[e + 1]])

    ours = microseconds([lambda o=o: _grouped.tiled_linear(x, o, *packed) for o in routings])
    decoded = microseconds(
        [lambda o=o: _grouped._decoded_linear(x, o, core, tiled, vector, n, block) for o in routings[:3]]
    )
    theirs = microseconds([lambda o=o: _grouped._grouped_mm(x, transposed, o) for o in routings])
    looped = microseconds([lambda b=b: loop(b) for b in bounds])
    used = sum(len(set(b)) - 1 for b in bounds) / len(bounds)
    gb = used * n * core.row_bytes / 1e9
    return (
        f"{ours:7.1f} us ({gb / ours * 1e6:5.0f} GB/s), decoded {decoded:7.1f}, "
        f"bf16 grouped_mm {theirs:7.1f} ({theirs / ours:.2f} x), loop {looped:7.1f} ({looped / ours:.2f} x)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="p2_n256")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    args = parser.parse_args()
    for name in SHAPES:
        bench(name, args.grid, args.batches)


if __name__ == "__main__":
    main()
