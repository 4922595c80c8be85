"""The commands. Each imports what it needs when it runs, so that `higgs --help` is quick."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

# Before anything imports transformers: with a hub it would wait for the network on any path it does not find.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from . import allocation
from .options import Device, Json, MaybeBool, MaybeFloat, MaybeInt, MaybePath, MaybeText, Model, ScaleExponent
from .options import emit as _emit
from .options import local_model as _local_model
from .options import quiet_transformers as _quiet_transformers
from .options import text_file as _text_file
from .output import guarded, working

app = typer.Typer(
    name="higgs",
    help="Quantize language models without data, run and measure them. MODEL is always a local directory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(value: bool) -> None:
    if value:
        from .. import _core

        typer.echo(f"higgs {_core.version}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")] = False,
) -> None:
    pass


@app.command()
@guarded
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Directory to write.")],
    bits: Annotated[
        MaybeFloat,
        typer.Option(help="Bits a weight: one grid for all layers if one has that rate (default 4), else mixed grids."),
    ] = None,
    grid: Annotated[
        MaybeText, typer.Option(help="Grid id instead of --bits, e.g. p2_n256; see `higgs doctor`.")
    ] = None,
    sensitivities: Annotated[
        MaybePath, typer.Option(metavar="FILE", help="Mixed grids for --bits, scales counted, from `higgs measure`.")
    ] = None,
    plan: Annotated[MaybePath, typer.Option(metavar="FILE", help="Grids from `higgs plan -o FILE`.")] = None,
    menu: allocation.Menu = None,
    untie: allocation.Untie = False,
    low_rate: Annotated[
        MaybeBool, typer.Option("--low-rate/--no-low-rate", help=f"{allocation.LOW_RATE_HELP} On if not said.")
    ] = None,
    fix: allocation.Fix = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Mixed grids: include the output head.")] = False,
    lm_head_grid: Annotated[MaybeText, typer.Option(help="Quantize the output head too, on this grid.")] = None,
    embedding_grid: Annotated[
        MaybeText, typer.Option(help="Quantize the embedding too, on this grid; a tied head needs its own.")
    ] = None,
    block: Annotated[
        MaybeInt, typer.Option(help="Hadamard block (default: a power of two from 256 on, else the largest possible).")
    ] = None,
    group: Annotated[MaybeInt, typer.Option(help="Columns that share a scale (default: at least 512).")] = None,
    seed: Annotated[int, typer.Option(help="Key of the random signs, and of sampled or random tokens.")] = 0,
    scales: Annotated[
        MaybeText,
        typer.Option(
            metavar="self|random|none|FILE",
            help="Column scales: text the model samples, random tokens, none, a text, or saved energies.",
        ),
    ] = None,
    scale_exponent: ScaleExponent = 0.25,
    scale_tokens: Annotated[int, typer.Option(min=2, help="Tokens to gather input energies over.")] = 8192,
    device: Device = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Fail if a layer cannot be quantized.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start over, whatever OUT holds of an earlier run.")] = False,
    json_output: Json = False,
) -> None:
    """Quantize MODEL into OUT, tensor by tensor; an interrupted run continues when called again.

    Column scales need a forward pass; where the model cannot be run the default goes on without, saying so. Mixed grids
    without --sensitivities need a backward pass to measure them.
    """
    from ..checkpoint import quantize_checkpoint

    _local_model(model)
    started = time.perf_counter()
    with working(json_output) as progress:
        energies, label = _energy_choice(model, scales or "self", scale_tokens, seed, device, progress)
        layout = {"scales": scales or "self", "scale_exponent": scale_exponent, "seed": seed, "block": block,
                  "group": group}  # fmt: skip
        mixed = allocation.allocation_choice(
            model, bits, grid, plan, sensitivities, menu, untie, low_rate, fix, lm_head, layout, progress
        )
        report = quantize_checkpoint(
            model, out, grid=grid, bits=None if mixed else bits, allocation=mixed and mixed[0],
            allocated=mixed and mixed[1], lm_head_grid=lm_head_grid, embedding_grid=embedding_grid, block=block,
            group=group, seed=seed, energies=energies, scales=label, scales_optional=scales is None,
            scale_exponent=scale_exponent, strict=strict, force=force, device=device, progress=progress,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    _emit(
        json_output,
        {"output": str(out), "seconds": seconds, **report.to_dict()},
        f"{report}\n{out}: done in {seconds:.1f} s",
    )


def _energy_choice(model: Path, scales: str, tokens: int, seed: int, device: str, progress: Any) -> tuple[Any, str]:
    """The input energies that ``--scales`` asks for (or a function that gathers them), and their name as a setting."""
    if scales == "none":
        return None, "none"
    from ..checkpoint import describe_energies
    from ..energies import Energies

    if scales.endswith(".safetensors"):
        energies = Energies.load(scales)
        return energies, f"{Path(scales).name} ({describe_energies(energies).rsplit('(', 1)[1]}"
    label = f"{scales} tokens={tokens}"
    if scales not in ("random", "self"):
        import hashlib

        digest = hashlib.sha256(_text_file(Path(scales)).read_bytes()).hexdigest()[:16]
        label = f"{Path(scales).name} tokens={tokens} ({digest})"

    def gather() -> Energies | None:
        from ..energies import energies_for

        _quiet_transformers()
        return energies_for(model, scales, tokens=tokens, seed=seed, device=device, progress=progress)

    return gather, label


@app.command()
@guarded
def energies(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="File to write (.safetensors).")],
    text: Annotated[
        str, typer.Option(metavar="self|random|FILE", help="Tokens: sampled from the model, random, or of a text.")
    ] = "self",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to run.")] = 8192,
    seed: Annotated[int, typer.Option(help="Seed of sampled or random tokens.")] = 0,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Gather the input energies of MODEL's layers, for `higgs quantize --scales FILE`."""
    from ..energies import energies_for

    if text not in ("self", "random"):
        _text_file(Path(text))
    with working(json_output) as progress:
        _quiet_transformers()
        gathered = energies_for(_local_model(model), text, tokens=tokens, seed=seed, device=device, progress=progress)
        if gathered is None:
            raise ValueError(f"no energies for {text!r}")
        gathered.save(out)
    counts = {"layers": len(gathered.energies), "inputs": len(gathered.shared), "source": gathered.source}
    _emit(
        json_output,
        {"output": str(out), **counts},
        f"{out}: {counts['layers']} layers, {counts['inputs']} different inputs, from {gathered.source}",
    )


app.command()(allocation.measure)
app.command()(allocation.plan)
app.command()(allocation.report)


@app.command("eval")
@guarded
def evaluate_command(
    model: Model,
    text: Annotated[MaybePath, typer.Option(help="Text file to measure on.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[int, typer.Option(help="Number of windows, from the start of the text.")] = 16,
    bos: Annotated[bool, typer.Option("--bos", help="Start every window with BOS, for models trained so.")] = False,
    base: Annotated[MaybePath, typer.Option(help="Original model: also measure the KL divergence from it.")] = None,
    tasks: Annotated[MaybeText, typer.Option(metavar="NAME,...", help="Tasks of lm-eval to run.")] = None,
    task_dir: Annotated[MaybePath, typer.Option(metavar="DIR", help="More tasks: YAML files of lm-eval.")] = None,
    limit: Annotated[MaybeInt, typer.Option(min=1, help="Documents of each task (default: all).")] = None,
    few_shot: Annotated[
        MaybeInt, typer.Option(min=0, help="Examples in prompts (default: as the task has it).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents at once in tasks.")] = 1,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Measure the perplexity of MODEL on a text, tokens per second, effective bits, and KL against --base; or its
    results in tasks of lm-eval, whose data must be local (or cached)."""
    from ..evaluate import evaluate, evaluate_tasks

    if text is None and tasks is None:
        raise ValueError("nothing to measure; give --text FILE, --tasks NAME,... or both")
    result: dict[str, Any] = {}
    lines = []
    with working(json_output) as progress:
        _quiet_transformers()
        _local_model(model)
        if text is not None:
            base_dir = None if base is None else _local_model(base)
            result = evaluate(
                model, _text_file(text), context, windows, base=base_dir, bos=bos, device=device, progress=progress
            )
            lines.append(_perplexity_text(result))
        if tasks is not None:
            os.environ["HF_DATASETS_OFFLINE"] = "1"
            result["tasks"] = evaluate_tasks(
                model, tasks.split(","), task_dir=task_dir, limit=limit, few_shot=few_shot, batch_size=batch_size,
                device=device,
            )  # fmt: skip
            lines += _task_lines(result["tasks"])
    _emit(json_output, result, "\n".join(lines))


def _perplexity_text(result: dict[str, Any]) -> str:
    text = f"perplexity {result['perplexity']:.4f}, {result['tokens_per_s']:.0f} tokens/s"
    if result.get("bits") is not None:
        text += f", {result['bits']:.3f} bits a weight"
    if result.get("kl") is not None:
        text += f", KL {result['kl']:.5f}"
    return f"{text} ({result['windows']} windows of {result['context']})"


def _task_lines(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """``task metric value +- standard error`` for every metric."""
    lines = []
    for task, metrics in tasks.items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr,{kind}")
                lines.append(f"{task} {name} {value:.4f}" + (f" +- {error:.4f}" if isinstance(error, float) else ""))
    return lines


@app.command()
@guarded
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Continue a text, greedily."""
    from ..evaluate import generate

    with working(json_output, quiet=True) as progress:
        _quiet_transformers()
        text = generate(_local_model(model), prompt, max_new_tokens, device=device, progress=progress)
    _emit(json_output, {"prompt": prompt, "text": text}, text)


@app.command()
@guarded
def inspect(model: Model, json_output: Json = False) -> None:
    """List the layers of MODEL: grid, bits, t2, bytes. Reads the headers only."""
    from ..checkpoint import inspect_checkpoint
    from .tables import inspection_text

    found = inspect_checkpoint(_local_model(model))
    _emit(json_output, found, inspection_text(found))


@app.command()
@guarded
def doctor(json_output: Json = False) -> None:
    """Tell what this installation is and can do."""
    from .doctor import as_text, examine

    with working(json_output):
        facts = examine()
    _emit(json_output, facts, as_text(facts))


@app.command()
@guarded
def demo(
    work_dir: Annotated[Path, typer.Option(help="Where models and results go.")] = Path("higgs-demo"),
    windows: Annotated[int, typer.Option(min=1, help="Windows of text to measure on.")] = 4,
    json_output: Json = False,
) -> None:
    """Get a small model, quantize it at several widths, compare and plot."""
    from .. import demo as demo_module
    from .tables import demo_text

    with working(json_output) as progress:
        _quiet_transformers()
        result = demo_module.run(work_dir, windows=windows, progress=progress)
    _emit(json_output, result, demo_text(result))
