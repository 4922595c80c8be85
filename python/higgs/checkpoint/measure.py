"""Measuring the sensitivities of a checkpoint on disk: resumable, on one process or the ranks of ``torchrun``."""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .. import _core, energies, jobs
from ..devices import rank_device
from ..energies import Energies, gather_energies, own_tokens, pooled_column_scales, weight_energy
from ..measure import LEVELS, Fisher, Method, Noise, check_levels, find_targets
from ..moe import projections
from ..progress import NullProgress, Progress
from ..sensitivity import LayerSensitivity, Sensitivities
from .files import Checkpoint, json_bytes, read_json, write_file
from .work import _refusal

_TOKENS = {"fisher": 8192, "noise": 2048}


@dataclass(frozen=True)
class MeasureOptions:
    """How to measure. ``text``: "self" (tokens sampled from the model), "random", or a text file; ``tokens`` of it
    (default 8192 for fisher, 2048 for noise) in windows of ``context`` (at most the positions of the model; with less
    context tokens are more sensitive). ``objective`` (noise): "kl" or "loss" (of the
    text). ``scales``: column scales as in ``higgs quantize``."""

    method: str = "fisher"
    text: str = "self"
    tokens: int | None = None
    context: int = 1024
    objective: str = "kl"
    levels: tuple[float, ...] = LEVELS
    scales: str = "self"
    scale_exponent: float = 0.25
    lm_head: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in _TOKENS:
            raise ValueError(f"method {self.method!r} is not supported; use {' or '.join(_TOKENS)}")
        if self.objective == "loss" and (self.method != "noise" or self.text in ("self", "random")):
            raise ValueError("objective 'loss' needs method 'noise' and a text file; use 'kl'")
        if self.context < 2:
            raise ValueError(f"context {self.context} is not supported; use at least 2")
        check_levels(self.levels)

    @property
    def token_count(self) -> int:
        return _TOKENS[self.method] if self.tokens is None else self.tokens


def measure_checkpoint(
    source: str | Path,
    out: str | Path,
    options: MeasureOptions | None = None,
    *,
    force: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Sensitivities:
    """Measures the sensitivities of the model in ``source`` (fp32 arithmetic) and writes them to the JSON file ``out``.

    Finished jobs are kept in ``OUT.work`` until all are done: after an interruption the same call continues; with other
    settings it raises ValueError, unless ``force``. Under ``torchrun`` every rank calls this and shares the jobs.
    ``device``: "cpu" or "cuda", see :func:`~higgs.devices.rank_device`.

    Raises ValueError for illegal options, UnsupportedError for a model without layers to quantize, or no such device.
    """
    options, out = options or MeasureOptions(), Path(out)
    settings = _settings(Checkpoint(source), options)
    if out.exists() and not force:
        found = Sensitivities.load(out)
        if found.about.get("settings") != settings:
            raise ValueError(_refusal(out, "was made", found.about.get("settings", {}), settings))
        return found
    return _measure(Path(source), out, options, settings, force, device, progress or NullProgress())


def _measure(
    source: Path, out: Path, options: MeasureOptions, settings: dict, force: bool, device: str, progress: Progress
) -> Sensitivities:
    from ..evaluate import load_model

    work, team = Path(f"{out}.work"), jobs.Team()
    model = load_model(source, device=rank_device(device))
    team.first_rank_first(lambda: _prepare(work, model, source, options, settings, force, progress))
    used = Energies.load(work / "energies.safetensors") if (work / "energies.safetensors").exists() else None
    token_ids = load_file(work / "tokens.safetensors")["token_ids"]
    method, skipped = make_method(model, token_ids, used, options)
    results = jobs.run_jobs(team, method.jobs(), method.run, work, progress)
    found = to_sensitivities(model, method, results, used, options)
    found.about["settings"] = settings
    if skipped:
        found.about["skipped"] = skipped

    def finish() -> None:
        found.save(out)
        shutil.rmtree(work)

    team.first_rank_first(finish)
    return found


def make_method(
    model: nn.Module, token_ids: torch.Tensor, used: Energies | None, options: MeasureOptions
) -> tuple[Method, dict[str, str]]:
    """The method that ``options`` ask for, on the layers of ``model`` with the column scales that ``used`` gives, and
    {layer: reason} for layers that cannot be quantized."""
    scales = _column_scales(model, used, options.scale_exponent)
    targets, skipped = find_targets(model, scales, lm_head=options.lm_head)
    if options.method == "fisher":
        is_text = options.text not in ("self", "random")
        return Fisher(model, targets, token_ids, is_text=is_text, seed=options.seed), skipped
    noise = Noise(model, targets, token_ids, objective=options.objective, levels=options.levels, seed=options.seed)
    return noise, skipped


def to_sensitivities(
    model: Any, method: Method, results: dict[str, Any], used: Energies | None, options: MeasureOptions
) -> Sensitivities:
    """The fitted results as they are saved."""
    modules: dict[str, Any] = {**dict(model.named_modules()), **projections(model)}
    layers, first_order = [], method.first_order(results)
    for name, (alpha, residual) in method.fit(results).items():
        linear = modules[name]
        scaled = used is not None and name in used.energies
        layers.append(
            LayerSensitivity(
                name, linear.out_features, linear.in_features, alpha, scaled, residual, first_order.get(name, 0.0)
            )
        )
    about = {"method": options.method, "text": options.text, "scales": options.scales}
    return Sensitivities(layers, relative_error=method.relative_error(results), about=about)


def _settings(checkpoint: Checkpoint, options: MeasureOptions) -> dict[str, str]:
    settings = {"higgs": _core.version, **{key: str(value) for key, value in asdict(options).items()}}
    settings["tokens"] = str(options.token_count)
    for key in ("text", "scales"):
        if Path(settings[key]).is_file():
            settings[key] += f" ({hashlib.sha256(Path(settings[key]).read_bytes()).hexdigest()[:16]})"
    settings.update({f"source {name}": value for name, value in checkpoint.fingerprint().items()})
    return settings


def _prepare(
    work: Path,
    model: nn.Module,
    source: Path,
    options: MeasureOptions,
    settings: dict[str, str],
    force: bool,
    progress: Progress,
) -> None:
    """Makes ``work`` with settings, input energies and tokens, unless it is there from an interrupted run."""
    file = work / "settings.json"
    old = read_json(file) if file.exists() else None
    if old is not None and old != settings and not force:
        raise ValueError(_refusal(work, "was begun", old, settings))
    if old != settings or force:
        shutil.rmtree(work, ignore_errors=True)
    if file.exists():
        return
    window_length(model, options)  # errors before the model runs
    ids = None if options.text == "self" else sample_tokens(model, source, options, progress)
    used, sampled = _energies(model, source, options, progress)
    if ids is None:
        ids = sample_tokens(model, source, options, progress, sampled)
    work.mkdir(parents=True, exist_ok=True)
    if used is not None:
        used.save(work / "energies.safetensors")
    save_file({"token_ids": ids.contiguous()}, work / "tokens.safetensors")
    write_file(file, json_bytes(settings))  # last: with it the folder is complete


def _energies(
    model: nn.Module, source: Path, options: MeasureOptions, progress: Progress
) -> tuple[Energies | None, torch.Tensor | None]:
    """The energies that ``scales`` asks for, and the text that the model sampled for them, if it did."""
    if options.scales in ("random", "self"):
        ids = own_tokens(model, options.scales, seed=options.seed, progress=progress)
        used = gather_energies(model, ids, source=options.scales, progress=progress)
        return used, ids if options.scales == "self" else None
    return energies.energies_for(source, options.scales, seed=options.seed, progress=progress), None


def window_length(model: Any, options: MeasureOptions) -> int:
    """Tokens of a window. Raises ValueError if all tokens are fewer."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = min(options.context, positions or options.context)
    if options.token_count < context:
        raise ValueError(f"tokens {options.token_count} must be at least context {context}")
    return context


def sample_tokens(
    model: Any, source: Path, options: MeasureOptions, progress: Progress, sampled: torch.Tensor | None = None
) -> torch.Tensor:
    """int64 [windows, context]. Text of the model's own is sampled in short pieces (or is ``sampled``, if that is
    enough), which are then joined: every token more in a piece is one more pass through the model."""
    count = options.token_count
    context = window_length(model, options)
    if options.text == "self":
        if sampled is None or sampled.numel() < count:
            piece = min(energies.SELF_CONTEXT, context)
            sampled = energies.self_tokens(model, math.ceil(count / piece) * piece, piece, options.seed, progress)
        return sampled.flatten()[: count // context * context].view(-1, context)
    if options.text == "random":
        return energies.random_tokens(model.config.get_text_config().vocab_size, count, context, options.seed)
    from transformers import AutoTokenizer

    from ..evaluate import read_text, token_windows

    text = read_text(options.text)
    return token_windows(AutoTokenizer.from_pretrained(source), text, context, count // context)


def _column_scales(model: nn.Module, used: Energies | None, exponent: float) -> dict[str, torch.Tensor]:
    if used is None:
        return {}
    known: dict[str, Any] = {**energies.linear_layers(model), **projections(model)}
    layers = {n: m for n, m in known.items() if n in used.energies and m.in_features % 64 == 0}
    weights = {name: weight_energy(layer.weight).cpu() for name, layer in layers.items()}
    blocks = {name: _core.default_block(layer.in_features) for name, layer in layers.items()}
    return pooled_column_scales(used, weights, blocks, exponent)
