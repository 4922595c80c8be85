"""Time the CUDA kernels next to torch bf16, other libraries' int4 kernels and a read-only kernel over the same bytes.

    cmake --build BUILD --target higgs_cuda_bench
    python bench/python/bench_kernels.py BUILD/cuda/libhiggs_cuda_bench.so --shapes 8b_gate_up 8b_o --m 1 8 16

Every number is the median over replays of a CUDA graph of dependent launches that walks over enough copies of the
weights to defeat the L2 cache; the rotation of x is part of each call. Up to 256 rows a graph has 128 calls, which is
what a decoding step of a model of 32 layers has: its start and end, about 10 us, count as they do there. Columns: us
per call, GB/s of stored bytes, share of the memory limit (read kernel / ours), times faster than bf16 linear, the int4
peers (torch's tinygemm and, where installed, humming: `pip install humming-kernels`; both multiply x as it is), times
faster than the best of them.

To follow one kernel while it is tuned: test_speed.py beside this file.
"""

import argparse
import ctypes
import importlib.util
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from shapes import BITS, MAIN, SHAPES

L2_BYTES = 256 << 20  # walk over at least this much
CALLS = 128  # per graph, at least
CALLS_MANY_ROWS = 24
MANY_ROWS = 257
WARM_MS = 30  # of replays before those that count
MAX_TINYGEMM_ROWS = 64  # tinygemm's time grows with m


class Kernels:
    def __init__(self, path: str) -> None:
        self.lib = ctypes.CDLL(path)
        self.lib.higgs_last_error.restype = ctypes.c_char_p
        self.lib.higgs_plan.restype = ctypes.c_char_p

    def call(self, name: str, *args: object) -> None:
        converted = [
            ctypes.c_void_p(a.data_ptr())
            if isinstance(a, torch.Tensor)
            else a.encode()
            if isinstance(a, str)
            else ctypes.c_longlong(a)
            if isinstance(a, int)
            else a
            for a in args
        ]
        self.check(name, *converted, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))

    def check(self, name: str, *args: object) -> None:
        if getattr(self.lib, name)(*args) != 0:
            raise RuntimeError(f"{name}: {self.lib.higgs_last_error().decode()}")

    def sizes(self, grid: str, n: int, k: int) -> list[int]:
        out = (ctypes.c_longlong * 4)()
        self.check("higgs_sizes", grid.encode(), ctypes.c_longlong(n), ctypes.c_longlong(k), out)
        return list(out)


def pointers(tensors: list[torch.Tensor]) -> ctypes.Array:
    """Their addresses; the array keeps them alive (graph captures return free memory to the device)."""
    array = (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])
    array.tensors = tensors
    return array


def captured(calls: list) -> torch.cuda.CUDAGraph:
    """A graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def warm_up(graph: torch.cuda.CUDAGraph) -> None:
    """An idle GPU needs a while to raise its clocks."""
    warm = 0.0
    while warm < WARM_MS:
        warm += replay_ms(graph)


def graph_us(calls: list, replays: int = 15) -> float:
    """Median microseconds per call of a graph of all calls."""
    graph = captured(calls)
    warm_up(graph)
    return sorted(replay_ms(graph) for _ in range(replays))[replays // 2] * 1e3 / len(calls)


def cycle(copies: int, make, m: int = 1) -> list:
    """Calls that take the copies in turn, each copy as often as the others."""
    made = [make(i) for i in range(copies)]
    rounds = -(-(CALLS if m < MANY_ROWS else CALLS_MANY_ROWS) // copies)
    return made * rounds


def copies_for(bytes_each: int) -> int:
    return max(2, -(-L2_BYTES // bytes_each))


def time_bf16(ns: tuple[int, ...], k: int, ms: list[int]) -> dict[int, float]:
    n = sum(ns)
    copies = copies_for(2 * n * k)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    out = {}
    for m in ms:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        out[m] = graph_us(cycle(copies, lambda i, x=x, y=y: lambda: torch.mm(x, weights[i].t(), out=y), m))
    return out


def time_tinygemm(ns: tuple[int, ...], k: int, ms: list[int]) -> dict[int, float]:
    n, group = sum(ns), 128
    ms = [m for m in ms if m <= MAX_TINYGEMM_ROWS]
    if k % 1024 != 0:
        return {}
    copies = copies_for(n * k // 2)
    weights = [
        torch._convert_weight_to_int4pack(torch.randint(0, 255, (n, k // 2), device="cuda", dtype=torch.uint8), 8)
        for _ in range(copies)
    ]
    scales = torch.randn(k // group, n, 2, device="cuda", dtype=torch.bfloat16)
    out = {}
    for m in ms:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        out[m] = graph_us(
            cycle(copies, lambda i, x=x: lambda: torch._weight_int4pack_mm(x, weights[i], group, scales), m)
        )
    return out


def time_humming(ns: tuple[int, ...], k: int, ms: list[int]) -> dict[int, float]:
    """int4, group 128, the kernels that the library's heuristics choose; layers that share x as one matrix."""
    if importlib.util.find_spec("humming") is None or k % 128 != 0:
        return {}
    from humming.layer import HummingLayer

    def layer() -> torch.nn.Module:
        made = HummingLayer(sum(ns), k, {"dtype": "int4", "group_size": 128}, torch_dtype=torch.bfloat16).cuda()
        made.load_from_unquantized(torch.randn(sum(ns), k, device="cuda", dtype=torch.bfloat16))
        made.transform()
        return made

    layers = [layer() for _ in range(copies_for(sum(ns) * k // 2))]
    out = {}
    for m in ms:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        out[m] = graph_us(cycle(len(layers), lambda i, x=x: lambda: layers[i](x), m))
    return out


PEERS = {"tinygemm": time_tinygemm, "humming": time_humming}


def time_read(kernels: Kernels, bytes_each: int) -> float:
    buffers = [
        torch.empty(bytes_each, device="cuda", dtype=torch.uint8).random_() for _ in range(copies_for(bytes_each))
    ]
    sink = torch.zeros(4, device="cuda", dtype=torch.int32)
    return graph_us(cycle(len(buffers), lambda i: lambda: kernels.call("higgs_read", buffers[i], bytes_each, sink)))


def tiled_copies(kernels: Kernels, grid: str, ns: tuple[int, ...], k: int) -> list[list[torch.Tensor]]:
    """Random weights, tiled: one tensor for each n in each copy."""
    stored = sum(kernels.sizes(grid, n, k)[3] for n in ns)
    copies = []
    for _ in range(copies_for(stored)):
        parts = []
        for n in ns:
            index_bytes, scale_bytes, tiled_bytes, _ = kernels.sizes(grid, n, k)
            indices = torch.randint(0, 256, (index_bytes,), device="cuda", dtype=torch.uint8)
            scales = torch.rand(scale_bytes // 2, device="cuda").half()
            buffer = torch.empty(tiled_bytes, device="cuda", dtype=torch.uint8)
            kernels.call("higgs_repack", grid, n, k, indices, scales, buffer)
            parts.append(buffer)
        copies.append(parts)
    return copies


def linear_calls(
    kernels: Kernels, grid: str, ns: tuple[int, ...], k: int, m: int, dtype: torch.dtype,
    tiled: list[list[torch.Tensor]],
) -> list:  # fmt: skip
    d = torch.empty(k, device="cuda")
    kernels.call("higgs_vector", k, d)
    code = ctypes.c_int({torch.float16: 1, torch.bfloat16: 2}[dtype])
    n_array = (ctypes.c_longlong * len(ns))(*ns)
    bytes_needed = ctypes.c_longlong()
    kernels.check(
        "higgs_linear_workspace", grid.encode(), len(ns), n_array, ctypes.c_longlong(k), code, ctypes.c_longlong(m),
        ctypes.byref(bytes_needed),
    )  # fmt: skip
    workspace = torch.empty(max(16, bytes_needed.value), device="cuda", dtype=torch.uint8)
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    ys = [torch.empty(m, n, device="cuda", dtype=dtype) for n in ns]
    y_array = pointers(ys)

    def make(i: int):
        tiled_array = pointers(tiled[i])
        return lambda: kernels.call(
            "higgs_linear", grid, ctypes.c_int(len(ns)), n_array, k, code, m, x, d, tiled_array, y_array, workspace
        )

    return cycle(len(tiled), make, m)


def time_linear(
    kernels: Kernels, grid: str, ns: tuple[int, ...], k: int, ms: list[int], dtype: torch.dtype
) -> dict[int, float]:
    tiled = tiled_copies(kernels, grid, ns, k)
    return {m: graph_us(linear_calls(kernels, grid, ns, k, m, dtype, tiled)) for m in ms}


def bench_quantize(kernels: Kernels, grid: str) -> None:
    n, k = 14336, 4096
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    index_bytes, scale_bytes, _, _ = kernels.sizes(grid, n, k)
    indices = torch.empty(index_bytes, device="cuda", dtype=torch.uint8)
    scales = torch.empty(scale_bytes // 2, device="cuda", dtype=torch.float16)
    call = lambda: kernels.call("higgs_quantize", grid, n, k, ctypes.c_int(2), w, indices, scales)  # noqa: E731
    us = graph_us([call] * 3, 5)
    print(f"quantize {grid}: {n * k / us / 1e3:.3g} billion weights/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="libhiggs_cuda_bench.so")
    parser.add_argument("--shapes", nargs="+", default=list(MAIN), choices=list(SHAPES))
    parser.add_argument("--grids", nargs="+", default=list(BITS.values()))
    parser.add_argument("--m", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--quantize", action="store_true")
    parser.add_argument(
        "--plan-for", nargs=2, type=int, metavar=("SM", "KB"), default=[0, 0],
        help="plan as for another architecture: 80 163, 86 99, ...",
    )  # fmt: skip
    parser.add_argument("--no-peers", action="store_true", help="skip the other libraries' int4 kernels")
    args = parser.parse_args()
    kernels = Kernels(args.library)
    peers = {} if args.no_peers else PEERS
    kernels.check("higgs_plan_for", *(ctypes.c_int(v) for v in args.plan_for))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}")
    print(
        f"{'shape':16}{'grid':9}{'m':>5}{'us':>8}{'GB/s':>7}{'limit':>8}{'of it':>7}"
        f"{'bf16':>8}{'x bf16':>8}" + "".join(f"{peer:>10}" for peer in peers) + f"{'x best':>8}"
    )
    for name in args.shapes:
        ns, k = SHAPES[name]
        bf16 = time_bf16(ns, k, args.m)
        theirs = {peer: time_peer(ns, k, args.m) for peer, time_peer in peers.items()}
        for grid in args.grids:
            stored = sum(kernels.sizes(grid, n, k)[3] for n in ns)
            limit = time_read(kernels, stored // 16 * 16)
            ours = time_linear(kernels, grid, ns, k, args.m, getattr(torch, args.dtype))
            for m in args.m:
                peer = "".join(f"{us[m]:10.2f}" if m in us else f"{'-':>10}" for us in theirs.values())
                best = min((us[m] for us in theirs.values() if m in us), default=None)
                peer += f"{best / ours[m]:8.2f}" if best is not None else ""
                print(
                    f"{name:16}{grid:9}{m:5}{ours[m]:8.2f}{stored / ours[m] / 1e3:7.0f}{limit:8.2f}"
                    f"{limit / ours[m]:7.2f}{bf16[m]:8.1f}{bf16[m] / ours[m]:8.2f}{peer}",
                    flush=True,
                )
    if args.quantize:
        for grid in args.grids:
            bench_quantize(kernels, grid)


if __name__ == "__main__":
    main()
