"""What surrounds the weights of a quantized checkpoint: the other files of the source, and a model card."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from .. import _core
from ..report import Report
from .files import INDEX_FILE, Checkpoint, write_file
from .plan import Options
from .work import REPORT_FILE

_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
_TEMPLATES = "additional_chat_templates"  # the one subdirectory that tokenizers read
_HASH = r" \([0-9a-f]{16}\)"  # that settings add to the name of a file
_CARD_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")


def copy_companions(source: Path, out: Path) -> list[str]:
    """Copies generation_config.json, tokenizer, chat template, licence and custom code; returns the names copied."""
    names = {p.name for pattern in _COMPANIONS for p in source.glob(pattern) if p.is_file()}
    names -= {"config.json", INDEX_FILE, REPORT_FILE}
    files = sorted(n for n in names if not n.endswith(".index.json"))
    templates = source / _TEMPLATES
    if templates.is_dir():
        (out / _TEMPLATES).mkdir(exist_ok=True)
        files += sorted(f"{_TEMPLATES}/{p.name}" for p in templates.glob("*.jinja"))
    for name in files:
        write_file(out / name, (source / name).read_bytes())
    return files


def front_matter(card: Path) -> dict[str, str]:
    """The entries of a model card's YAML header with their text as it stands (continuation lines included)."""
    try:
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8"), re.DOTALL)
    except (OSError, UnicodeDecodeError):
        return {}
    entries: dict[str, str] = {}
    key = None
    for line in match.group(1).splitlines() if match else []:
        start = re.match(r"([A-Za-z_][\w-]*):(.*)", line)
        if start:
            key = start.group(1)
            entries[key] = start.group(2).rstrip()
        elif key:
            entries[key] += "\n" + line.rstrip()
    return entries


def base_model(source: Path, card: dict[str, str]) -> str:
    """The name of the original: from the path of a hub cache, the card's own base_model, or the directory's name."""
    for part in source.resolve().parts:
        cached = re.fullmatch(r"models--(.+?)--(.+)", part)
        if cached:
            return f"{cached.group(1)}/{cached.group(2)}"
    named = card.get("base_model", "").strip().strip("'\"")
    if named and "\n" not in named:
        return named
    return source.resolve().name


def command_line(source: Path, out: Path, options: Options, scales: str) -> str:
    """The `higgs quantize` call that makes the same bytes, with directory names in place of paths."""
    uniform = options.grid in {grid.name for grid in _core.grids()}
    words = ["higgs", "quantize", source.resolve().name, "-o", out.resolve().name]
    words += ["--grid", options.grid] if uniform else shlex.split(re.sub(_HASH, "", options.grid))
    given = {"lm-head-grid": options.lm_head_grid, "embedding-grid": options.embedding_grid, "block": options.block,
             "group": options.group}  # fmt: skip
    for option, value in given.items():
        words += [] if value is None else [f"--{option}", str(value)]
    words += ["--seed", str(options.seed), *_scale_options(scales)]
    if scales != "none":
        words += ["--scale-exponent", f"{options.scale_exponent:g}"]
    return shlex.join(words)


def _scale_options(scales: str) -> list[str]:
    """``scales`` is "random tokens=8192", "FILE tokens=8192 (hash)" or "FILE (hash)"."""
    match = re.fullmatch(r"(.*?)(?: tokens=(\d+))?(?: \([0-9a-f]+\))?", scales)
    name, tokens = match.groups() if match else (scales, None)
    return ["--scales", name, *(["--scale-tokens", tokens] if tokens else [])]


def model_card(checkpoint: Checkpoint, out: Path, options: Options, settings: dict[str, str], report: Report) -> str:
    """README.md of the quantized checkpoint. The same inputs give the same text (no dates, no timings)."""
    original = front_matter(checkpoint.path / "README.md")
    base = base_model(checkpoint.path, original)
    header = [f"base_model: {base}", "base_model_relation: quantized", "library_name: transformers"]
    header += [f"{key}:{original[key]}" for key in _CARD_KEYS if key in original]
    header += ["tags:", "- quantized", "- higgs", "- higgs_quant"]
    rows = []
    for grid in dict.fromkeys(r.grid for r in report.layers):
        part = Report([r for r in report.layers if r.grid == grid])
        weights = sum(r.n * r.k for r in part.layers)
        rows.append(f"| {grid} | {len(part.layers)} | {weights / 1e6:.1f} M | {part.bits:.3f} | {part.t2:.6f} |")
    skipped = [f"- `{name}`: {reason}" for name, reason in report.skipped.items()]
    notes = [f"- {note}" for note in report.notes]
    scaled = any(r.column_scale for r in report.layers)
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            f"# {out.resolve().name}",
            "",
            f"{base} quantized to {report.bits:.2f} bits a weight with [HIGGS](https://arxiv.org/abs/2411.17525).",
            "",
            "| grid | layers | weights | bits | mean t2 |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Bits count the scales; t2 is the relative squared error of a layer's weights"
            + (" (after column scaling)." if scaled else "."),
            *(["", "Not quantized:", "", *skipped] if skipped else []),
            *(["", "Notes:", "", *notes] if notes else []),
            "",
            "## Use",
            "",
            "```sh",
            "pip install higgs-quant",
            "```",
            "",
            "```python",
            "import higgs  # registers the format, which loading needs",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{out.resolve().name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{out.resolve().name}")',
            "```",
            "",
            "Made by",
            "",
            "```sh",
            command_line(checkpoint.path, out, options, settings["scales"] if scaled else "none"),
            "```",
            "",
        ]
    )
