"""Quantizing a checkpoint on disk: tensor by tensor, so that memory holds the largest tensor and never the model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _core
from ..config import LayerConfig, QuantizationConfig, guard_tensor
from ..devices import pick_device
from ..energies import weight_energy
from ..errors import UnsupportedError
from ..progress import NullProgress, Progress
from ..report import LayerReport, Report
from .files import INDEX_FILE, Checkpoint, ShardWriter, json_bytes, sync_directory, write_file
from .plan import LayerPlan, Options, Plan, ShardPlan, make_plan, natural, pick_grid, shard_specs
from .release import copy_companions, model_card
from .scales import ColumnScales, quantize_named, read_rows
from .work import REPORT_FILE, WorkFolder, finished_report

if TYPE_CHECKING:
    from ..allocate import Allocation
    from ..energies import Energies


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    grid: str | None = None,
    bits: float | None = None,
    allocation: Callable[[Path], Allocation] | None = None,
    allocated: str | None = None,
    lm_head_grid: str | None = None,
    embedding_grid: str | None = None,
    block: int | None = None,
    group: int | None = None,
    seed: int = 0,
    energies: Energies | Callable[[], Energies | None] | None = None,
    scales: str | None = None,
    scales_optional: bool = False,
    scale_exponent: float = 0.25,
    strict: bool = False,
    force: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Quantizes the Linear layers of the Hugging Face model directory ``source`` into the directory ``out``.

    ``grid`` (an id) or ``bits`` (the uniform choice of that rate, default 4) for all layers but the output head, which
    stays as it is unless ``lm_head_grid`` is given; a head tied to the embedding then gets tensors of its own. The
    embedding stays unless ``embedding_grid`` is given (of a tied one: both). Memory holds about the largest tensor.

    ``allocation`` instead is a function that returns the grids of the layers (by their names in transformers; those it
    leaves out stay), called only if there is work to do. It gets a path at which to keep sensitivities until the output
    is complete. ``allocated`` are the options of ``higgs quantize`` that stand for it: a setting like the others.

    With ``energies`` every layer gets a column scale (a_j / b_j)^``scale_exponent``, shared among layers that read the
    same input. They may be a function that is called only if there is work to do; ``scales`` then says in words what it
    will return, since that is a setting. With ``scales_optional`` an UnsupportedError it raises becomes a note.

    Layers whose k is no multiple of 64 stay as they are and are in ``report.skipped``; ``strict`` makes that an error.
    Shards appear one by one under their names when complete, config.json last. After an interruption the same call
    continues; with changed settings it raises ValueError, unless ``force``, which starts over in any case. A finished
    ``out`` with the same settings is left alone (a note in the report says so).

    ``device``: where layers are quantized, see :func:`~higgs.devices.pick_device`; the bytes do not depend on it.

    Raises FormatError for a broken source, ValueError for illegal arguments, an already quantized source, or a weight
    that is NaN or inf (naming the tensor), OSError for files that cannot be written.
    """
    if allocation is not None and (grid is not None or bits is not None or allocated is None):
        raise ValueError("an allocation excludes grid and bits, and needs `allocated`")
    target = pick_device(device)
    chosen = pick_grid(grid, bits)
    options = Options(
        chosen if allocated is None else allocated, lm_head_grid, embedding_grid, block, group, seed, scale_exponent
    )
    out = Path(out)
    if out.resolve() == Path(source).resolve():
        raise ValueError(f"{out} is the source itself; choose another output directory")
    checkpoint = Checkpoint(source)
    # Before anything is written; an allocation may need long to make, and cannot make an impossible plan possible.
    plan = make_plan(checkpoint, replace(options, grid=chosen), strict=strict)
    settings = _settings(checkpoint, options, _describe(energies, scales))
    done = finished_report(out, settings, force=force)
    if done is not None:
        done.notes.append(f"{out} was already complete; nothing was done")
        return done
    with WorkFolder(out).opened(settings, force=force) as work:
        if allocation is not None:
            plan = _allocated_plan(checkpoint, options, allocation(work.sensitivities), strict=strict)
        used, note = _obtain(work, energies, scales_optional)
        if note:
            plan.notes.append(note)
        plan.key_signs(options.seed, used)
        job = _Job(checkpoint, plan, options, settings, out, work, used, target, progress or NullProgress())
        return job.run()


def _allocated_plan(checkpoint: Checkpoint, options: Options, found: Allocation, *, strict: bool) -> Plan:
    plan = make_plan(checkpoint, options, strict=strict, allocation=found.grids)
    optimum = "the optimum" if found.gap == 0 else f"at most {found.gap:.2g} above the optimum"
    plan.notes += [*found.notes, f"predicted loss increase {found.predicted_loss:.5f} nats ({optimum})"]
    return plan


def _describe(energies: Any, scales: str | None) -> str:
    """The setting that tells one choice of input energies from another."""
    if scales is not None:
        return scales
    if energies is None:
        return "none"
    if callable(energies):
        raise TypeError("energies is a function: say in `scales` what it returns")
    return describe_energies(energies)


def describe_energies(energies: Energies) -> str:
    """Source and hash of input energies, as they appear among the settings of a checkpoint."""
    digest = hashlib.sha256(repr(energies.shared).encode())
    for name in sorted(energies.energies):
        digest.update(name.encode())
        digest.update(energies.energies[name].float().contiguous().numpy().tobytes())
    return f"{energies.source} ({digest.hexdigest()[:16]})"


def _settings(checkpoint: Checkpoint, options: Options, scales: str) -> dict[str, str]:
    settings = {"higgs": _core.version, "format_version": str(_core.format_version)}
    settings.update({key: "default" if value is None else str(value) for key, value in asdict(options).items()})
    settings["lm_head_grid"] = options.lm_head_grid or "none"
    settings["embedding_grid"] = options.embedding_grid or "none"
    settings["scales"] = scales
    if scales == "none":
        del settings["scale_exponent"]  # decides nothing
    settings.update({f"source {name}": value for name, value in checkpoint.fingerprint().items()})
    return settings


def _obtain(work: WorkFolder, energies: Any, optional: bool) -> tuple[Energies | None, str | None]:
    """The energies to use and a note about them; those of an interrupted run, if there was one."""
    if not callable(energies):
        return energies, None
    kept = work.load_energies()
    if kept is not None:
        return kept
    note = None
    try:
        used = energies()
    except UnsupportedError as e:
        if not optional:
            raise
        used, note = None, f"no column scales: {e}"
    work.save_energies(used, note)
    return used, note


class _Job:
    """One run over the shards that are not finished yet."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        options: Options,
        settings: dict[str, str],
        out: Path,
        work: WorkFolder,
        energies: Energies | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.plan, self.options, self.settings = checkpoint, plan, options, settings
        self.out, self.work, self.device, self.progress = out, work, device, progress
        self.scales = ColumnScales(checkpoint, plan, energies, options.scale_exponent)
        unscaled = [layer.name for layer in plan.layers if not layer.outer and layer.name not in self.scales.layers]
        if energies is not None and unscaled:
            plan.notes.append(f"no column scale, for want of input energies: {', '.join(unscaled)}")

    def run(self) -> Report:
        finished = {shard.name: self.work.load_shard(shard.name) for shard in self.plan.shards}
        missing = [shard for shard in self.plan.shards if finished[shard.name] is None]
        self.progress.start("quantizing", sum(_weights(layer) for shard in missing for layer in shard.layers))
        for shard in missing:
            finished[shard.name] = self._write_shard(shard)
            self.work.save_shard(shard.name, finished[shard.name] or {})
        self.progress.finish()
        report = self._report([record for record in finished.values() if record is not None])
        self._finish(report)
        return report

    def _write_shard(self, shard: ShardPlan) -> dict[str, Any]:
        specs = shard_specs(self.checkpoint, shard, self.scales.layers)
        metadata = {**self.checkpoint.metadata[shard.source], "format": "pt"}
        writer = ShardWriter(self.out / shard.name, specs, metadata)
        try:
            layers, pooling = [], {}
            for layer in shard.layers:
                layers.append(asdict(self._write_layer(writer, layer)))
                pooling[layer.name] = self.scales.pooling_cost(layer)
                self.progress.advance(_weights(layer))
            for name in shard.copied:
                writer.write(name, self.checkpoint.chunks(name))
            writer.finish()
        finally:
            writer.abort()
        return {"layers": layers, "pooling": pooling}

    def _write_layer(self, writer: ShardWriter, layer: LayerPlan) -> LayerReport:
        scale = self.scales.of(layer)  # before the weight is read: this may read weights too
        rows = _QuantizedRows(self.checkpoint, layer, scale, self.device)
        writer.write(f"{layer.name}.indices", rows)
        writer.write(f"{layer.name}.scales", torch.cat(rows.scales))
        if scale is not None:
            writer.write(f"{layer.name}.column_scale", scale)
        if layer.guard:
            writer.write(f"{layer.name}.weight", guard_tensor())
        return LayerReport.of(layer.name, layer.fmt, column_scale=scale is not None, t2=rows.t2, seconds=rows.seconds)

    def _report(self, records: list[dict[str, Any]]) -> Report:
        layers = [LayerReport(**layer) for record in records for layer in record["layers"]]
        costs = {name: c for record in records for name, c in record["pooling"].items() if c is not None}
        notes = list(self.plan.notes)
        if costs:
            worst = max(costs, key=lambda name: costs[name])
            notes.append(
                f"sharing column scales among layers with the same input raises the expected output error of "
                f"{len(costs)} layers by {100 * sum(costs.values()) / len(costs):.2f} % on average, "
                f"at most {100 * costs[worst]:.2f} % ({worst})"
            )
        return Report(sorted(layers, key=lambda r: natural(r.layer)), dict(self.plan.skipped), notes)

    def _finish(self, report: Report) -> None:
        """Everything but the weights; config.json last, so that a directory with one is complete."""
        if len(self.plan.shards) > 1:
            write_file(self.out / INDEX_FILE, json_bytes(self._index()))
        copy_companions(self.checkpoint.path, self.out)
        card = model_card(self.checkpoint, self.out, self.options, self.settings, report)
        write_file(self.out / "README.md", card.encode())
        write_file(self.out / REPORT_FILE, json_bytes({**report.to_dict(), "settings": self.settings}))
        layers = {
            layer.name: LayerConfig.of(layer.fmt, column_scale=layer.name in self.scales.layers, experts=layer.experts)
            for layer in self.plan.layers
        }
        config = {**self.checkpoint.config}
        if self.plan.unties:
            config["tie_word_embeddings"] = False
            if isinstance(config.get("text_config"), dict):
                config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
        config["quantization_config"] = QuantizationConfig(layers).to_dict()
        write_file(self.out / "config.json", json_bytes(config))
        self.work.remove()
        sync_directory(self.out)

    def _index(self) -> dict[str, Any]:
        specs = {s.name: shard_specs(self.checkpoint, s, self.scales.layers) for s in self.plan.shards}
        weight_map = {tensor: shard for shard, tensors in specs.items() for tensor in tensors}
        return {
            "metadata": {"total_size": sum(_total(tensors) for tensors in specs.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }


class _QuantizedRows:
    """The indices of a layer as pieces of bytes, each made of a tensor when it is asked for. Afterwards: ``scales``,
    ``t2`` and the ``seconds`` it took."""

    def __init__(
        self, checkpoint: Checkpoint, layer: LayerPlan, column_scale: torch.Tensor | None, device: torch.device
    ) -> None:
        self._checkpoint, self._layer, self._column_scale, self._device = checkpoint, layer, column_scale, device
        self.scales: list[torch.Tensor] = []
        self.t2 = self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        errors, weights = [], []
        for source, weight in read_rows(self._checkpoint, self._layer):
            start = time.perf_counter()
            weight = weight.to(self._device)
            indices, scales, t2 = quantize_named(weight, source, self._layer.fmt, self._column_scale)
            self.seconds += time.perf_counter() - start
            self.scales.append(scales.cpu())
            errors.append(t2)
            weights.append(1.0 if len(self._layer.sources) == 1 else self._energy(weight))
            yield indices.cpu().view(-1).numpy()
        total = sum(weights)
        self.t2 = sum(t2 * w for t2, w in zip(errors, weights, strict=True)) / total if total else 0.0

    def _energy(self, weight: torch.Tensor) -> float:
        """What t2 of the rows is relative to."""
        s2 = 1.0 if self._column_scale is None else self._column_scale.double().square()
        return float((weight_energy(weight).double() * s2).sum())


def _weights(layer: LayerPlan) -> int:
    return layer.fmt.n * layer.fmt.k


def _total(specs: dict) -> int:
    return sum(spec.nbytes for spec in specs.values())
