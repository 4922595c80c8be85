"""Perplexity over draws of the signs: mean and standard error for each grid, and how much smaller its increase is.

    python bench/python/bench_draws.py MODEL TEXT --grids p2_n256 t2_b8 a2_b8 --draws 12 [--scales self] [--device cuda]

MODEL is an unquantized checkpoint. Draw s quantizes it with `seed=s`; all draws and grids share the input energies, and
the same windows of TEXT are scored in fp32 with dequantized weights. "less" compares with the first grid, paired by
draw: the error is of the mean.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from pathlib import Path

import higgs
from higgs.devices import pick_device
from higgs.energies import energies_for
from higgs.evaluate import load, read_text, score, token_windows


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for one value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def less(values: list[float], reference: list[float]) -> tuple[float, float]:
    """1 - mean(values) / mean(reference) in percent, and its error to first order for pairs."""
    ratio = statistics.fmean(values) / statistics.fmean(reference)
    residuals = [v - ratio * r for v, r in zip(values, reference, strict=True)]
    return 100 * (1 - ratio), 100 * mean_and_error(residuals)[1] / statistics.fmean(reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--grids", nargs="+", required=True, help="the first is what the others are compared with")
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--scales", default="self", help="as of `higgs quantize`")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.draws < 1:
        parser.error(f"--draws {args.draws}: at least 1")
    device = pick_device(args.device)
    base, tokenizer = load(args.model, device=device)
    windows = token_windows(tokenizer, read_text(args.text), args.context, args.windows)
    energies = energies_for(args.model, args.scales, device=args.device)
    full = score(base, windows)["perplexity"]
    print(f"{args.model.name} on {args.text.name}, {len(windows)} windows of {args.context}, scales {args.scales}: "
          f"perplexity {full:.4f}", flush=True)  # fmt: skip
    increases: dict[str, list[float]] = {}
    divergences: dict[str, list[float]] = {}
    for grid in args.grids:
        perplexities, divergences[grid], seconds = [], [], 0.0
        for seed in range(args.draws):
            model = copy.deepcopy(base)
            start = time.perf_counter()
            higgs.quantize_(model, grid=grid, scales=energies or "none", seed=seed)
            seconds += time.perf_counter() - start
            found = score(higgs.dequantize_(model), windows, base)
            perplexities.append(found["perplexity"])
            divergences[grid].append(found["kl"])
        increases[grid] = [p - full for p in perplexities]
        line = "{:8} {} draws: perplexity {:.3f} +- {:.3f}, KL {:.4f} +- {:.4f}".format(
            grid, args.draws, *mean_and_error(perplexities), *mean_and_error(divergences[grid])
        )
        for name, values in (("increase", increases), ("KL", divergences)):
            if grid != args.grids[0]:
                line += ", {} {:.1f} +- {:.1f} % less".format(name, *less(values[grid], values[args.grids[0]]))
        print(f"{line}, quantized in {seconds / args.draws:.1f} s")
        print("        ", " ".join(f"{p:.3f}" for p in perplexities), flush=True)


if __name__ == "__main__":
    main()
