"""Decode speed of a whole model: tokens/s of a Llama-shaped transformers model with random weights, bf16 against higgs.

    python bench/python/bench_decode.py --grids p2_n256 p2_n64 --batch 1 16

Both sides run the same harness: static cache, one decoding step captured in a CUDA graph (``--compile``: by
torch.compile, mode "reduce-overhead"), the next token by argmax. The output head is quantized to ``--head-grid``.
Prints tokens/s, milliseconds a token, the share of the linear layers (a profile of one step), seconds to quantize and
the memory of the weights.
"""

import argparse
import time

import higgs
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

SHAPES = {  # hidden, MLP, layers, heads, key/value heads, vocabulary
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (128, 256, 2, 4, 2, 512),
}
CONTEXT = 512
LINEAR_KERNELS = ("gemv", "gemm", "nvjet", "cutlass", "cublas", "pack_", "splitk", "xmma")


def make_model(shape: str, device: str) -> LlamaForCausalLM:
    hidden, mlp, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=False, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def allocation_of(model: nn.Module, grid: str, head_grid: str) -> dict[str, str]:
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return {name: head_grid if name == "lm_head" else grid for name in names}


class Decoder:
    """One decoding step at position ``position``, which it advances; ids: int64 [batch, 1]."""

    def __init__(self, model: LlamaForCausalLM, batch: int, compiled: bool) -> None:
        device = model.device
        self.cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.model = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
        for _ in range(3):
            self.step()
        self.graph = None
        if not compiled and device.type == "cuda":
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()

    def step(self) -> None:
        out = self.model(
            self.ids, past_key_values=self.cache, cache_position=self.position,
            position_ids=self.position[None].expand(len(self.ids), 1), use_cache=True,
        )  # fmt: skip
        self.ids.copy_(out.logits[:, -1:].argmax(-1))
        self.position += 1

    def run(self) -> None:
        self.step() if self.graph is None else self.graph.replay()


@torch.inference_mode()
def measure(model: LlamaForCausalLM, batch: int, compiled: bool, steps: int) -> tuple[float, float]:
    """Milliseconds a step, and those spent in kernels of linear layers."""
    decoder = Decoder(model, batch, compiled)
    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    for _ in range(8):
        decoder.run()
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        decoder.run()
    synchronize()
    per_step = (time.perf_counter() - start) / steps * 1e3
    if model.device.type != "cuda":
        return per_step, float("nan")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decoder.run()
        synchronize()
    linear = sum(e.device_time_total for e in profile.key_averages() if any(k in e.key.lower() for k in LINEAR_KERNELS))
    return per_step, linear / 1e3


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--grids", nargs="+", default=["p2_n256", "p2_n64"])
    parser.add_argument("--head-grid", default="ch8")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    header = f"{'weights':10}{'batch':>6}{'ms':>9}{'linear ms':>10}{'tokens/s':>10}{'x bf16':>8}{'GB':>7}"
    print(f"{header}{'quantize s':>11}")
    base: dict[int, float] = {}
    for grid in ["bf16", *args.grids]:
        model = make_model(args.shape, args.device)
        seconds = 0.0
        if grid != "bf16":
            start = time.perf_counter()
            higgs.quantize_(model, allocation=allocation_of(model, grid, args.head_grid), scales="none")
            seconds = time.perf_counter() - start
        for batch in args.batch:
            ms, linear = measure(model, batch, args.compile, args.steps)
            base.setdefault(batch, ms)
            print(
                f"{grid:10}{batch:6}{ms:9.3f}{linear:10.3f}{batch / ms * 1e3:10.1f}{base[batch] / ms:8.2f}"
                f"{weight_bytes(model) / 1e9:7.2f}{seconds:11.1f}",
                flush=True,
            )
        del model


if __name__ == "__main__":
    main()
