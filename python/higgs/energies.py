"""Column scales: putting the rounding error where the activations are small.

The rotation spreads a block's rounding error evenly over its columns, also onto the few whose activations are huge.
With input energies a_j = E x_j^2 and weight energies b_j = mean_i w_ij^2 the expected output error of W diag(s)
quantized and x / s multiplied is proportional to ``sum_j a_j / s_j^2 * sum_j b_j s_j^2``, least at
``s_j = (a_j / b_j)^(1/4)``. The a_j are gathered over text that the model samples unless told otherwise: the method
needs no data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .devices import pick_device
from .errors import FormatError, UnsupportedError
from .linear import as_linear, is_conv1d
from .moe import projections, recorded_inputs
from .progress import NullProgress, Progress

_FORMAT = "higgs_energies"
_BATCH_TOKENS = 1024
SELF_CONTEXT = 256  # tokens of a text that the model samples: each costs a pass through the model
ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)$")


@dataclass
class Energies:
    """Mean squared input of every Linear layer, float32 [k], and which layers read the same input."""

    energies: dict[str, Tensor]
    shared: list[list[str]]  # every layer in exactly one list
    source: str  # "self", "random" or the name of the text

    def inputs_of(self, layers: Container[str]) -> list[list[str]]:
        """Those of ``layers`` whose input energy is known, the readers of one input in one list."""
        inputs = [[name for name in names if name in layers and name in self.energies] for names in self.shared]
        return [names for names in inputs if names]

    def save(self, path: str | Path) -> None:
        metadata = {"format": _FORMAT, "version": "1", "shared": json.dumps(self.shared), "source": self.source}
        tensors = {name: e.contiguous().clone() for name, e in self.energies.items()}
        temporary = Path(f"{path}.tmp")
        try:
            save_file(tensors, temporary, metadata)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Energies:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no energies file at {path}")
        try:
            with safe_open(path, "pt") as f:
                metadata = f.metadata() or {}
                energies = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (no mapping)
        except Exception as e:  # safetensors raises its own, undocumented exception type
            raise FormatError(f"{path} is not a readable safetensors file: {e}") from e
        if metadata.get("format") != _FORMAT or metadata.get("version") != "1":
            found = f"{metadata.get('format')!r} version {metadata.get('version')!r}"
            raise FormatError(f"{path} holds {found}, expected {_FORMAT!r} version '1'; make it with `higgs energies`")
        try:
            return cls(energies, json.loads(metadata["shared"]), metadata.get("source", "unknown"))
        except (KeyError, ValueError) as e:
            raise FormatError(f"{path}: bad list of the layers that share an input: {e!r}") from None


def random_tokens(vocab_size: int, tokens: int = 8192, context: int = 512, seed: int = 0) -> Tensor:
    """Uniformly random token ids, int64 [tokens // context, context]."""
    if tokens < context or context < 2:
        raise ValueError(f"tokens {tokens} must be at least context {context}, and context at least 2")
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (tokens // context, context), generator=generator)


@torch.inference_mode()
def self_tokens(
    model: nn.Module, tokens: int = 8192, context: int = SELF_CONTEXT, seed: int = 0, progress: Progress | None = None
) -> Tensor:
    """Text that the model samples itself, each sequence from a random first token: int64 [tokens // context, context].

    As free of data as random tokens, and nearer to what the model will see; it takes ``context`` decoding steps. A
    model whose logits are NaN gets any tokens: its energies will be NaN, for which there are messages.
    """
    progress = progress or NullProgress()
    generator = torch.Generator().manual_seed(seed)
    ids = random_tokens(_vocab_size(model), tokens, context, seed)[:, :1]
    device = next(model.parameters()).device
    cache: dict[str, Any] = {}
    inputs = ids
    progress.start("sample tokens", context - 1)
    for _ in range(context - 1):
        output = model(inputs.to(device), use_cache=True, **cache)
        probabilities = output.logits[:, -1].float().softmax(-1).nan_to_num(nan=1.0).cpu()
        last = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, last], 1)
        past = getattr(output, "past_key_values", None)
        cache, inputs = ({}, ids) if past is None else ({"past_key_values": past}, last)
        progress.advance()
    progress.finish()
    return ids


def weight_energy(weight: Tensor) -> Tensor:
    """Sum over rows (and matrices, of [experts, n, k]) of w_ij^2: float32 [k], on the CPU."""
    k = weight.shape[-1]
    total = torch.zeros(k, dtype=torch.float64, device=weight.device)
    for rows in weight.detach().flatten(0, -2).split(max(1, 2**18 // k)):  # fp64 copies stay small
        total += rows.double().square().sum(0)
    return total.float().cpu()


def column_scale(
    input_energy: Tensor, weight_energy: Tensor, exponent: float = 0.25, block: int | None = None
) -> Tensor:
    """s_j = (a_j / b_j)^exponent, of geometric mean about 1: float16 [k], positive and finite.

    With ``block``, every block is also multiplied by the constant that gives all blocks the same pooled energy
    sum_j b_j s_j^2. Blocks that share one scale (narrow layers) then all use the grid as it was made for; the error in
    each stays the same fraction of its energy, so the choice of s within a block is not touched.

    Dead columns (no activation, or no weight) count as having 1e-6 of the mean energy.
    """
    if not 0 <= exponent <= 0.5:
        raise ValueError(f"scale exponent {exponent} is not supported; use 0 to 0.5 (0.25: optimal for exact energies)")
    if not (torch.isfinite(input_energy).all() and torch.isfinite(weight_energy).all()):
        raise ValueError("input or weight energies contain NaN or inf")
    a, b = _floored(input_energy), _floored(weight_energy)
    log_s = exponent * (a.log() - b.log())
    if block is not None:
        pooled = (b * (2 * log_s).exp()).view(-1, block).sum(1)
        log_s -= 0.5 * pooled.log().repeat_interleave(block)
    return (log_s - log_s.mean()).exp().to(torch.float16)


def _floored(energy: Tensor) -> Tensor:
    """Relative to the mean, at least 1e-6: float64."""
    energy = energy.double()
    mean = energy.mean()
    return (energy / mean).clamp(min=1e-6) if mean > 0 else torch.ones_like(energy)


def pooled_energy(input_energy: Tensor, weight_energies: list[Tensor]) -> Tensor:
    """b_j of layers that read the same input: float64 [k].

    Each layer counts by 1 / sum_j a_j b_j, the inverse energy of its output (for uncorrelated inputs), so that the sum
    of the relative output errors is least and a large q does not drown a small, sensitive v.
    """
    a = input_energy.double()
    return torch.stack([b.double() / (a * b).sum().clamp(min=1e-30) for b in weight_energies]).sum(0)


def pooled_column_scales(
    energies: Energies, weight_energies: dict[str, Tensor], blocks: dict[str, int], exponent: float = 0.25
) -> dict[str, Tensor]:
    """Column scales of the layers in ``weight_energies`` ({layer: :func:`weight_energy`}), one for all layers that read
    the same input (b_j: :func:`pooled_energy`), so that one rotated x serves them all. Layers whose input energy is not
    known get none. ``blocks``: Hadamard block of each layer."""
    scales = {}
    for names in energies.inputs_of(weight_energies):
        a = energies.energies[names[0]]
        pooled = pooled_energy(a, [weight_energies[name] for name in names])
        shared = column_scale(a, pooled, exponent, blocks[names[0]])
        scales.update(dict.fromkeys(names, shared))
    return scales


@contextmanager
def _recorded_inputs(layers: Mapping[str, nn.Module], record) -> Iterator[None]:
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers to quantize: every nn.Linear but the output head, routers of experts (tiny, and exact or nothing), and
    none whose weight is an embedding's."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: m
        for name, m in model.named_modules()
        if type(m) is nn.Linear and m is not head and id(m.weight) not in embeddings and not ROUTER.search(name)
    }


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """:func:`linear_layers`, and the Conv1D of transformers."""
    return {**linear_layers(model), **{name: m for name, m in model.named_modules() if is_conv1d(m)}}


@torch.inference_mode()
def gather_energies(
    model: nn.Module, token_ids: Tensor, *, source: str = "random", progress: Progress | None = None
) -> Energies:
    """Runs ``token_ids`` [windows, context] through ``model`` and averages x_j^2 over all tokens but each window's
    first for every Linear (or Conv1D) layer, and for the experts of mixtures over the tokens that they get.

    Layers share an input if in the first batch their hooks saw the same tensor (same storage, shape and strides).
    """
    progress = progress or NullProgress()
    layers = quantizable_layers(model)
    widths = {name: as_linear(m).in_features for name, m in layers.items()}
    widths.update({name: layer.in_features for name, layer in projections(model).items()})
    if not widths:
        raise UnsupportedError("the model has no Linear layers to gather input energies of")
    sums = {name: torch.zeros(k, dtype=torch.float64) for name, k in widths.items()}
    counts = dict.fromkeys(sums, 0)
    readers: dict[tuple, list[str]] = {}
    first_inputs: list[Tensor] = []  # of the first batch, kept alive so that no address comes twice

    def record(name: str, x: Tensor) -> None:
        if first_batch:
            first_inputs.append(x)
            readers.setdefault((x.data_ptr(), tuple(x.shape), x.stride()), []).append(name)
        if x.dim() == 3:
            x = x[:, 1:]  # the first token is an attention sink, with massive activations like no other's
        add(name, x)

    def add(name: str, x: Tensor) -> None:
        sums[name] += x.flatten(0, -2).float().square().sum(0, dtype=torch.float64).cpu()
        counts[name] += x.numel() // x.shape[-1]

    body = getattr(model, "base_model", model)  # without the output head, which takes time and is not asked for
    device = next(model.parameters()).device
    batches = token_ids.split(max(1, _BATCH_TOKENS // token_ids.shape[1]))
    progress.start("input energies", len(batches))
    with _recorded_inputs(layers, record), recorded_inputs(model, token_ids.shape[1], add):
        for i, batch in enumerate(batches):
            first_batch = i == 0
            body(batch.to(device), use_cache=False)
            first_inputs.clear()
            progress.advance()
    progress.finish()
    energies = {name: (sums[name] / counts[name]).float() for name in sums if counts[name]}
    if not energies:
        raise UnsupportedError("no Linear layer was used in the forward pass")
    shared = list(readers.values())
    known = {name for names in shared for name in names}
    shared += [[name] for name in energies if name not in known]
    return Energies(energies, shared, source)


def text_tokens(model_dir: str | Path, path: str | Path, tokens: int, context: int) -> Tensor:
    """The first ``tokens`` tokens of a text file, int64 [tokens // context, context]."""
    from transformers import AutoTokenizer

    text = Path(path).read_text(encoding="utf8")
    ids = AutoTokenizer.from_pretrained(model_dir)(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    windows = min(len(ids), tokens) // context
    if windows == 0:
        raise ValueError(f"{path} has {len(ids)} tokens, fewer than one window of {context}")
    return ids[: windows * context].view(windows, context)


def energies_for(
    model_dir: str | Path,
    scales: str,
    *,
    tokens: int = 8192,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Energies | None:
    """The input energies that ``--scales`` asks for.

    "none"; "self" (text sampled from the model), "random" (tokens) or a text file, which run the model in ``model_dir``
    with transformers; or a file of energies (.safetensors). UnsupportedError says why where the model cannot be run
    (transformers missing, unknown architecture, not enough memory). ``device``: see
    :func:`~higgs.devices.pick_device`.
    """
    if scales == "none":
        return None
    if scales.endswith(".safetensors"):
        return Energies.load(scales)
    if scales not in ("random", "self") and not Path(scales).is_file():
        raise ValueError(f"scales {scales!r}: use self, random, none, a text file or a .safetensors file of energies")
    model = _load_model(Path(model_dir), pick_device(device))
    if scales in ("random", "self"):
        return own_energies(model, scales, tokens=tokens, seed=seed, progress=progress)
    ids = text_tokens(model_dir, scales, tokens, context=512)
    return gather_energies(model, ids, source=Path(scales).name, progress=progress)


def _vocab_size(model: Any) -> int:
    return model.config.get_text_config().vocab_size


def own_tokens(
    model: nn.Module, source: str, *, tokens: int = 8192, seed: int = 0, progress: Progress | None = None
) -> Tensor:
    """Text that the model samples itself ("self"; windows of ``SELF_CONTEXT``) or "random" tokens (512), windows no
    longer than the model has positions: int64 [windows, context]."""
    positions = getattr(cast(Any, model).config.get_text_config(), "max_position_embeddings", None) or 512
    if source == "self":
        return self_tokens(model, tokens, min(SELF_CONTEXT, positions), seed=seed, progress=progress)
    return random_tokens(_vocab_size(model), tokens, min(512, positions), seed=seed)


def own_energies(
    model: nn.Module, source: str, *, tokens: int = 8192, seed: int = 0, progress: Progress | None = None
) -> Energies:
    """Energies without data, over :func:`own_tokens`."""
    ids = own_tokens(model, source, tokens=tokens, seed=seed, progress=progress)
    return gather_energies(model, ids, source=source, progress=progress)


def _load_model(model_dir: Path, device: torch.device) -> nn.Module:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        raise UnsupportedError("input energies need transformers to run the model: pip install transformers") from e
    size = sum(f.stat().st_size for f in model_dir.glob("*.safetensors"))
    available = _available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if size > 0.8 * available:
        raise UnsupportedError(
            f"the model ({size / 2**30:.1f} GiB) does not fit in the available memory of {device} "
            f"({available / 2**30:.1f} GiB)"
        )
    try:
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval().to(device)
    except (ValueError, KeyError, ImportError) as e:
        raise UnsupportedError(f"transformers cannot load the model: {e}") from e


def _available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63
