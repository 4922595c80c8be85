"""Decode speed of a quantized Llama-shaped model on several GPUs, tensor-parallel by transformers, against one GPU.

    python bench/python/bench_tensor_parallel.py --shape 70b --layers 16 --grid p2_n256 --ranks 1 2
    python bench/python/bench_tensor_parallel.py --model novels-29M --block 256 --ranks 1 2

Makes and quantizes the model (random weights, or those of ``--model``), saves it and lets torchrun load it in as many
ranks; prints milliseconds of a decoding step (static cache; eager code captured as one CUDA graph, NCCL included) and
how many of the tokens that a greedy ``generate`` says before the first one that differs from the first rank count's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import higgs
import torch
from bench_decode import SHAPES, Decoder, make_model, measure
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.distributed import DistributedConfig

PROMPT = torch.arange(3, 19)[None]


def save_quantized(args: argparse.Namespace, path: Path) -> None:
    if args.model is None:
        model = make_model(args.shape, args.device, args.layers)
    else:
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    higgs.quantize_(model, grid=args.grid, scales="none", block=args.block, group=args.block)
    model.save_pretrained(path)


def run_rank(args: argparse.Namespace, path: Path) -> None:
    """One rank under torchrun; the first writes what it found to ``path``/result.json."""
    parallel = {"distributed_config": DistributedConfig(tp_plan="auto")} if int(os.environ["WORLD_SIZE"]) > 1 else {}
    if args.device == "cpu":
        torch.set_num_threads(1)
    elif not parallel:
        parallel = {"device_map": "cuda"}
    model = AutoModelForCausalLM.from_pretrained(path, **parallel).eval()
    options = GenerationConfig(max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False, pad_token_id=0)
    tokens = model.generate(PROMPT.to(model.device), generation_config=options)[0].tolist()
    with torch.inference_mode():
        milliseconds = {b: measure(Decoder(model, b, compiled=False), args.steps, report=False)[0] for b in args.batch}
    if int(os.environ["RANK"]) == 0:
        (path / "result.json").write_text(json.dumps({"ms": list(milliseconds.values()), "tokens": tokens}))


def same_tokens(a: list[int], b: list[int]) -> int:
    """How many of the generated tokens are the same before the first that differs."""
    generated = list(zip(a, b, strict=True))[PROMPT.shape[1] :]
    return next((i for i, (x, y) in enumerate(generated) if x != y), len(generated))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of random weights")
    parser.add_argument("--grid", default="p2_n256")
    parser.add_argument("--block", type=int, default=1024, help="Hadamard block and scale group of all layers")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.checkpoint is not None:
        return run_rank(args, args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        save_quantized(args, Path(folder))
        if args.device == "cuda":
            torch.cuda.empty_cache()
        first: dict | None = None
        print(f"{'ranks':>5}{'batch':>6}{'ms':>9}{'x one':>8}   same tokens of {args.tokens}")
        for ranks in args.ranks:
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            subprocess.run([sys.executable, *command, *sys.argv, "--checkpoint", folder], check=True)
            found = json.loads((Path(folder) / "result.json").read_text())
            first = first or found
            same = same_tokens(first["tokens"], found["tokens"])
            for batch, ms, base in zip(args.batch, found["ms"], first["ms"], strict=True):
                print(f"{ranks:5}{batch:6}{ms:9.3f}{base / ms:8.2f}   {same}", flush=True)


if __name__ == "__main__":
    main()
