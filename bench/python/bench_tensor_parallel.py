"""Decode speed of a quantized Llama-shaped model on several GPUs, tensor-parallel by transformers, against one GPU.

    python bench/python/bench_tensor_parallel.py --shape 70b --layers 16 --grid p2_n256 --ranks 1 2
    python bench/python/bench_tensor_parallel.py --model novels-29M --block 256 --ranks 1 2

Makes and quantizes the model (random weights, or those of ``--model``), saves it and loads it in as many processes;
prints milliseconds of a decoding step (static cache; eager code captured as one CUDA graph, NCCL included), how many of
the tokens that a greedy ``generate`` says before the first one that differs from the first rank count's, and, given the
first's tokens, the relative error of the logits, that of the same rank in a shorter batch (other kernels, the same
weights), and how far they disagree on the next token: the largest lead of one token over the other's choice in the
first's logits, in units of the logits' root mean square error. Two ranks add up in another order, so that random
weights soon meet two logits closer than that. On stderr: when rank 0 got how far.
"""

import argparse
import faulthandler
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import higgs
import torch
from bench_decode import SHAPES, Decoder, make_model, measure, profile_step
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
    """One rank; the first writes what it found to ``path``/result.json."""
    faulthandler.dump_traceback_later(args.patience, exit=True)  # ranks that wait for each other wait for ever
    first = os.environ["RANK"] == "0"

    def say(what: str) -> None:
        if first:
            print(f"{time.time() - args.started:7.1f} s: {what}", file=sys.stderr, flush=True)

    say("imported")
    parallel = {"distributed_config": DistributedConfig(tp_plan="auto")} if int(os.environ["WORLD_SIZE"]) > 1 else {}
    if args.device == "cpu":
        torch.set_num_threads(1)
    elif not parallel:
        parallel = {"device_map": "cuda"}
    model = AutoModelForCausalLM.from_pretrained(path, **parallel).eval()
    say("loaded")
    options = GenerationConfig(max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False, pad_token_id=0)
    tokens = model.generate(PROMPT.to(model.device), generation_config=options)[0].tolist()
    say("generated")
    told = path / "tokens.json"  # of the first rank count
    if not told.exists() and first:
        told.write_text(json.dumps(tokens))
    sequence = json.loads(told.read_text()) if told.exists() else tokens
    ids = torch.tensor([sequence], device=model.device)
    shorter = PROMPT.shape[1]
    with torch.inference_mode():
        logits = model(ids).logits[0].float()
        noise, _ = compare_logits(logits[:shorter], model(ids[:, :shorter]).logits[0].float())
    if first:
        torch.save(logits[shorter - 1 : -1].cpu(), path / f"logits-{os.environ['WORLD_SIZE']}.pt")
    milliseconds = []
    for batch in args.batch:
        with torch.inference_mode():
            decoder = Decoder(model, batch, compiled=False)
        say(f"captured batch {batch}")
        milliseconds.append(measure(decoder, args.steps)[0])
        say(f"measured batch {batch}: {milliseconds[-1]:.3f} ms")
        if args.profile:
            profile_step(decoder, report=first)
        del decoder
    if first:
        (path / "result.json").write_text(json.dumps({"ms": milliseconds, "tokens": tokens, "noise": noise}))


def run_ranks(count: int, folder: str) -> dict:
    """What rank 0 of ``count`` processes finds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, *sys.argv, "--checkpoint", folder, "--started", str(time.time())]
    ranks = [subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)]
    if codes := [code for rank in ranks if (code := rank.wait())]:
        raise SystemExit(f"{len(codes)} of {count} ranks failed with exit status {codes[0]}")
    return json.loads((Path(folder) / "result.json").read_text())


def same_tokens(a: list[int], b: list[int]) -> int:
    """How many of the generated tokens are the same before the first that differs."""
    generated = list(zip(a, b, strict=True))[PROMPT.shape[1] :]
    return next((i for i, (x, y) in enumerate(generated) if x != y), len(generated))


def compare_logits(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Relative error of b, and the greatest lead in a of a's choice over b's in units of the root mean square error."""
    error = (b - a).norm() / a.norm()
    leads = a.max(-1).values - a.gather(-1, b.argmax(-1, keepdim=True))[:, 0]
    rms = (b - a).square().mean().sqrt()
    return error.item(), (leads.max() / rms.clamp_min(1e-30)).item()


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
    parser.add_argument("--patience", type=float, default=300, help="seconds until ranks give up, with a traceback")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of a step")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.checkpoint is not None:
        return run_rank(args, args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        save_quantized(args, Path(folder))
        if args.device == "cuda":
            torch.cuda.empty_cache()
        first: dict | None = None
        print(f"{'ranks':>5}{'batch':>6}{'ms':>9}{'x one':>8}   ", end="")
        print(f"same tokens of {args.tokens}, logits' error, that of a shorter batch, lead / error")
        for ranks in args.ranks:
            found = run_ranks(ranks, folder)
            first = first or found
            same = same_tokens(first["tokens"], found["tokens"])
            logits = [torch.load(Path(folder) / f"logits-{r}.pt") for r in (args.ranks[0], ranks)]
            error, lead = compare_logits(*logits)
            compared = f"{same}, {error:.1e}, {found['noise']:.1e}, {lead:.2f}"
            for batch, ms, base in zip(args.batch, found["ms"], first["ms"], strict=True):
                print(f"{ranks:5}{batch:6}{ms:9.3f}{base / ms:8.2f}   {compared}", flush=True)


if __name__ == "__main__":
    main()
