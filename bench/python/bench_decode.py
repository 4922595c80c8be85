"""Decode speed of a whole model: tokens/s of a Llama-shaped transformers model with random weights, bf16 against higgs.

    python bench/python/bench_decode.py --weights none none:bf16 none:ch8 bf16 p2_n256 p4_n4096 nf4 int4 --batch 1 16 \
        --compile --overlap --attention higgs_sdpa

All run the same harness: static cache, one decoding step as one CUDA graph (eager code, captured; with ``--compile``
torch.compile's, mode "reduce-overhead", in which the decoder layer is compiled once for all layers), the next token by
argmax. ``WEIGHTS:HEAD`` gives the output head weights of its own; ``WEIGHTS`` alone leaves it in bf16 or, where they
are a grid, quantizes it to ch8. bitsandbytes NF4 and torchao int4 (groups of 128) take part where they are installed.
``none`` is the model without linear layers, ``none:HEAD`` with the head alone: in their place an operator that launches
nothing and returns memory as it is. Prints milliseconds a step, of it those in kernels of linear layers (with
``--profile``, of one step; it slows all that comes after), those beyond a step of ``none``, those beyond a step of
``none`` with the same head (where these come before) and those on the host, tokens/s, gigabytes of weights and at the
peak, seconds to quantize and to compile.
"""

import argparse
import collections
import gc
import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any

import higgs
import torch
from higgs.integrations.inductor import overlap_kernels
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

SHAPES = {  # hidden, MLP, layers, heads, key/value heads, vocabulary
    "70b": (8192, 28672, 80, 64, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (128, 256, 2, 4, 2, 512),
}
CONTEXT = 512
LINEAR_KERNELS = ("gemv", "gemm", "nvjet", "cutlass", "cublas", "pack_", "splitk", "xmma", "4bit")
ATTENTION_KERNELS = ("fmha", "flash", "attention")  # which may have names like the above
PEERS = {"nf4": "bitsandbytes", "int4": "torchao"}


def make_model(shape: str, device: str, layers: int | None = None, attention: str | None = None) -> LlamaForCausalLM:
    """Random weights in bfloat16; ``layers`` instead of the shape's number of them, ``attention`` instead of SDPA."""
    hidden, mlp, all_layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers or all_layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=False,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.eval()


_library = torch.library.Library("higgs_bench", "DEF")
_library.define("nothing(Tensor x, int n) -> Tensor")


@torch.library.register_fake("higgs_bench::nothing", lib=_library)
def nothing(x: torch.Tensor, n: int) -> torch.Tensor:
    """y [..., n] of x [..., k], not computed."""
    return x.new_empty(*x.shape[:-1], n)


for _device in ("CPU", "CUDA"):
    _library.impl("nothing", nothing, _device)


class NoLinear(nn.Module):
    """Takes no time. Compiled code calls it as it is and so cannot leave out what makes its x or reads its y."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.rows = linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.higgs_bench.nothing(x, self.rows)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


class Int4Linear(nn.Module):
    """What torchao computes with its int4 ``weight``, from plain tensors: its own cannot enter a compiled region."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.group = weight.block_size[-1]
        self.qdata = nn.Parameter(weight.qdata, requires_grad=False)
        self.scale_and_zero = nn.Parameter(weight.scale_and_zero, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm(x.flatten(0, -2), self.qdata, self.group, self.scale_and_zero)
        return y.unflatten(0, x.shape[:-1])


def with_head(weights: str) -> tuple[str, str]:
    """The weights of the layers and those of the head: none, bf16 or a grid."""
    body, _, head = weights.partition(":")
    return body, head or {"none": "none", "bf16": "bf16", **dict.fromkeys(PEERS, "bf16")}.get(body, "ch8")


def quantize(model: LlamaForCausalLM, weights: str, shared: bool) -> None:
    """Puts ``weights`` (of which ``with_head`` tells those of the head) in the place of the model's."""
    body, head = with_head(weights)
    if body == "nf4":
        import bitsandbytes as bnb

        for name, linear in linears(model.model).items():
            new = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                device="meta",
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            model.model.set_submodule(name, new.to(linear.weight.device))
    elif body == "int4":
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        quantize_(model.model, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
        for name, linear in linears(model.model).items():
            model.model.set_submodule(name, Int4Linear(linear.weight))
    kinds = {name: head if name == "lm_head" else body for name in linears(model)}
    for name, linear in linears(model).items():
        if kinds[name] == "none":
            model.set_submodule(name, NoLinear(linear))
    grids = {name: kind for name, kind in kinds.items() if kind not in ("none", "bf16", *PEERS)}
    if grids:
        higgs.quantize_(model, allocation=grids, scales="none")
        higgs.share_inputs_(model, shared)


class Decoder:
    """One decoding step, of which the cache keeps the position; ids: int64 [batch, 1]."""

    def __init__(self, model: LlamaForCausalLM, batch: int, compiled: bool) -> None:
        cuda = model.device.type == "cuda"
        self.cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.position = torch.zeros(1, dtype=torch.long, device=model.device)
        self.forward: Callable = model
        self.step()  # eager: makes the cache, which a compiled step would make in another graph, at other addresses
        self.graph = None
        start = time.perf_counter()
        if compiled:
            torch._dynamo.reset()
            options = {"mode": "reduce-overhead"} if cuda else {}
            self.forward = torch.compile(model, fullgraph=True, dynamic=False, **options)
        for _ in range(3):
            self.step()
        self.compile_seconds = time.perf_counter() - start if compiled else math.nan
        if cuda and not compiled:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
                self.step()

    def step(self) -> None:
        out = self.forward(
            self.ids, past_key_values=self.cache, cache_position=self.position,
            position_ids=self.position[None].expand(len(self.ids), 1), use_cache=True,
        )  # fmt: skip
        self.ids.copy_(out.logits[:, -1:].argmax(-1))
        self.position += 1

    def run(self) -> None:
        self.step() if self.graph is None else self.graph.replay()


@torch.inference_mode()
def profile_step(decoder: Decoder, report: bool) -> float:
    """Milliseconds with a kernel of a linear layer running and no other; with ``report``, prints where a step goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decoder.run()
        torch.cuda.synchronize()
    kernels = [
        (e.time_range.start / 1e3, e.time_range.end / 1e3, e.name)
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]

    def is_linear(name: str) -> bool:
        name = name.lower()
        return any(k in name for k in LINEAR_KERNELS) and not any(k in name for k in ATTENTION_KERNELS)

    for kind in (True, False) if report else ():
        of_kind = [kernel for kernel in kernels if is_linear(kernel[2]) is kind]
        print(f"    {'linear' if kind else 'not linear'}: {covered(of_kind):.3f} ms in {len(of_kind)} kernels")
        times = collections.defaultdict(list)
        for start, end, name in of_kind:
            times[name].append(end - start)
        for name, ms in sorted(times.items(), key=lambda item: -sum(item[1]))[:6]:
            print(f"    {sum(ms):8.3f} ms {len(ms):5} x {name[:90]}")
    return covered(kernels) - covered([kernel for kernel in kernels if not is_linear(kernel[2])])


def covered(kernels: list[tuple[float, float, str]]) -> float:
    """Time in which at least one of ``kernels`` (start, end, name) runs."""
    total, last = 0.0, -math.inf
    for start, end, _ in sorted(kernels):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


@torch.inference_mode()
def measure(decoder: Decoder, steps: int) -> tuple[float, float]:
    """Milliseconds a step, and of it on the host, until the last is launched."""
    cuda = decoder.ids.is_cuda
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(8):
        decoder.run()
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        decoder.run()
    host = time.perf_counter() - start
    synchronize()
    per_step = time.perf_counter() - start
    return per_step / steps * 1e3, host / steps * 1e3


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def run(weights: str, args: argparse.Namespace, base: dict[int, float], rest: dict[tuple[str, int], float]) -> None:
    """Prints a line for each batch. ``base``: ms of the first weights but none; ``rest``: of none, by its head."""
    model = make_model(args.shape, args.device, attention=args.attention)
    body, head = with_head(weights)
    start = time.perf_counter()
    quantize(model, weights, not args.separate)
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    gc.collect()
    for batch in args.batch:
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            decoder = Decoder(model, batch, args.compile)
        ms, host = measure(decoder, args.steps)
        linear = profile_step(decoder, True) if args.profile and args.device == "cuda" else math.nan
        peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else math.nan
        if body == "none":
            rest[head, batch] = ms
        else:
            base.setdefault(batch, ms)
        beyond, layers = (ms - rest.get((kept, batch), math.nan) for kept in ("none", head))
        print(
            f"{weights:18}{batch:6}{ms:9.3f}{linear:10.3f}{beyond:10.3f}{layers:10.3f}{host:9.3f}"
            f"{batch / ms * 1e3:10.1f}{base.get(batch, math.nan) / ms:8.2f}"
            f"{weight_bytes(model) / 1e9:7.2f}{peak:8.2f}{seconds:11.1f}{decoder.compile_seconds:10.1f}",
            flush=True,
        )
        del decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument(
        "--weights", nargs="+", default=["none", "none:bf16", "none:ch8", "bf16", "p2_n256", "p4_n4096", *PEERS],
        metavar="WEIGHTS[:HEAD]", help="none, bf16, a grid, nf4 or int4; the first but none is the base",
    )  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--whole", action="store_true", help="compile all layers, as generate() does, not one for all")
    parser.add_argument("--separate", action="store_true", help="q/k/v and gate/up in launches of their own")
    parser.add_argument("--overlap", action="store_true", help="kernels start early (overlap_kernels)")
    parser.add_argument("--attention", help="attn_implementation of all weights")
    parser.add_argument("--profile", action="store_true", help="kernels of a step; slows all that comes after")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    overlap_kernels(args.overlap)
    if args.compile and not args.whole:
        LlamaDecoderLayer.forward = torch.compiler.nested_compile_region(LlamaDecoderLayer.forward)
    print(
        f"{'weights':18}{'batch':>6}{'ms':>9}{'linear ms':>10}{'over none':>10}{'w/o head':>10}{'host ms':>9}"
        f"{'tokens/s':>10}{'speed':>8}{'GB':>7}{'peak GB':>8}{'quantize s':>11}{'compile s':>10}"
    )
    base: dict[int, float] = {}
    rest: dict[tuple[str, int], float] = {}
    for weights in args.weights:
        peer = PEERS.get(with_head(weights)[0])
        if peer and not importlib.util.find_spec(peer):
            print(f"{weights}: {peer} is not installed")
            continue
        try:
            run(weights, args, base, rest)
        except Exception as e:  # whatever a peer raises where it has no kernel
            if not peer:
                raise
            print(f"{weights}: {peer} cannot run here: {type(e).__name__}: {str(e).splitlines()[0]}")


if __name__ == "__main__":
    main()
