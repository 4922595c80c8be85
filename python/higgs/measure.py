"""Measuring sensitivities: alpha_l of the linearity theorem, from noise or from the Fisher information.

Rounding noise is white where the weights are rounded: after column scales and rotation. The rotation is orthonormal, so
there it means independent Gaussian noise on W diag(s) whose variance in every scale group is t2 times the group's mean
square, hence on W itself noise of standard deviation t * r_ig / s_j (:func:`noise_std`), with r_ig the root mean square
of group g of row i of W diag(s). Its relative squared error in the scaled space is t2, as for a grid.

*noise* (arXiv 2411.17525, algorithm 3): adds such noise of several levels to one layer at a time and fits
loss increase = alpha t2 by least squares through the origin.

*fisher*: the same quantity to second order, from gradients. With delta the noise on layer l and p the model's own
distribution, KL(p || p_delta) = 1/2 delta^T F delta + O(delta^3), where F is the mean of g g^T over the tokens x and
over y ~ p(.|x), with g = d log p(y|x) / dW. The noise is independent, of mean 0 and variance t2 sigma_ij^2, so only the
diagonal of F is left:

    alpha_l = 1/2 sum_ij sigma_ij^2 F_ij,ij           (= 1/2 ||W_l||^2 mean(diag F) for equal sigma_ij)

Labels drawn from the model are independent given the tokens and their scores have mean 0, so the squared gradient of
the *sum* of log-probabilities over all positions of a batch is an unbiased estimate of the sum of the F's: one backward
pass a batch serves all layers. A few unlikely labels can double it for a batch. The KL under noise in all layers at
once (each its own, so that they add up) is the same sum, and a draw of so many numbers varies by a few percent: one
more forward pass a batch gives the factor that the alphas of all layers are multiplied by. Assumed: small noise (the
limit t2 -> 0), and a loss whose increase is this KL (exact for a model that predicts the text as it expects to).

On a text the loss has a gradient G_l too. Noise has mean 0, so its first-order term averages out, which is what the
theorem assumes (or a model at a stationary point). Rounding is not noise: values that are rounded to c, the centroid of
their cell, are c in the mean, so E[(c - w) w] = E[c^2] - E[w^2] = -E[(c - w)^2]. Errors shrink the weights,
E[error | W] = -t2 W, and the loss changes by -t2 <G_l, W_l> in the mean over the draws of the signs: *fisher* on a text
also gives first_order_l = -<G_l, W_l> (rotation and column scales leave <G, W> as it is), from a second backward pass
with the tokens that follow in the text. For labels that the model draws its expectation is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import UnsupportedError
from .moe import Projection, projections

_BATCH_TOKENS = 1024
LEVELS = (0.01, 0.02, 0.04)
JOINT_T2 = 0.002  # of the noise in all layers at once: that of 5 bits a weight, where nothing is far from linear


@dataclass(frozen=True)
class Target:
    """A layer to measure: its module (or a projection of experts), columns per scale, and column scale (float16 [k]) or
    None."""

    linear: nn.Linear | Projection
    group: int
    column_scale: Tensor | None

    def noise_std(self) -> Tensor:
        """Standard deviation of noise of relative squared error 1: float32, of the weight's shape."""
        weight = self.linear.weight.detach()
        return noise_std(weight.flatten(0, -2), self.group, self.column_scale).view(weight.shape)


def noise_std(weight: Tensor, group: int, column_scale: Tensor | None = None) -> Tensor:
    """r_ig / s_j for ``weight`` [n, k]: float32 [n, k]. ``group``: columns per scale; the last may be shorter."""
    k = weight.shape[1]
    scaled = weight.float()
    if column_scale is not None:
        s = column_scale.to(weight.device).float()
        scaled = scaled * s
    squares = functional.pad(scaled.square(), (0, -k % group)).unflatten(1, (-1, group)).sum(2)
    counts = torch.full((squares.shape[1],), float(group), device=weight.device)
    counts[-1] = k - (len(counts) - 1) * group
    rms = (squares / counts).sqrt().repeat_interleave(group, 1)[:, :k]
    return rms if column_scale is None else rms / s


class Method(Protocol):
    """Turns a list of independent jobs into sensitivities."""

    def jobs(self) -> list[str]: ...

    def run(self, job: str) -> Any:
        """The result of one job, as JSON."""

    def fit(self, results: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
        """{layer: (alpha, residual)} from the results of all jobs."""

    def first_order(self, results: Mapping[str, Any]) -> dict[str, float]:
        """{layer: -<G, W>}, in nats per unit t2; empty if not known."""

    def relative_error(self, results: Mapping[str, Any]) -> float | None:
        """Standard error of the sum of the alphas over it; None if not known."""


def _batches(token_ids: Tensor) -> list[Tensor]:
    return list(token_ids.split(max(1, _BATCH_TOKENS // token_ids.shape[1])))


def _log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the token after each position but the last: float32 [windows, context - 1, vocabulary]."""
    return model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)


class Fisher:
    """The method *fisher* on ``token_ids`` [windows, context]; one job is one batch of windows. ``is_text``: the tokens
    are a text, of which the first order is to be known too."""

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        token_ids: Tensor,
        *,
        is_text: bool = False,
        seed: int = 0,
    ) -> None:
        self._model, self._targets, self._is_text, self._seed = model, targets, is_text, seed
        self._ids = _batches(token_ids)

    def jobs(self) -> list[str]:
        return [f"batch {i}" for i in range(len(self._ids))]

    def run(self, job: str) -> dict[str, Any]:
        """``alphas``: {layer: estimate}; ``sum``: what noise in all layers says that the sum of the alphas is; for a
        text also ``first_order``: {layer: -<G, W>}."""
        i = int(job.split()[1])
        seed = self._seed * 1_000_003 + i
        ids, along = self._ids[i].to(_device(self._model)), dict[str, float]()
        with _gradients(self._model, self._targets):
            log_probs = _log_probs(self._model, ids).flatten(0, 1)
            base = log_probs.detach()
            if self._is_text:
                of_text = log_probs.gather(1, ids[:, 1:].reshape(-1, 1)).sum()
                along = _backward(of_text, self._targets, _along_weight, retain_graph=True)
            labels = _draw_labels(base, torch.Generator().manual_seed(seed))
            squares = _backward(log_probs.gather(1, labels).sum(), self._targets, _noise_energy)
            del log_probs
        if bad := [n for found in (squares, along) for n, total in found.items() if not math.isfinite(total)]:
            raise ValueError(f"the gradient of layer {bad[0]} is not finite on the tokens of {job}")
        with torch.inference_mode(), jointly_perturbed(self._model, self._targets, JOINT_T2, seed):
            kl = _kl(base, _log_probs(self._model, ids).flatten(0, 1))
        result = {
            "alphas": {name: 0.5 * total / len(labels) for name, total in squares.items()},
            "sum": kl / len(labels) / JOINT_T2,
        }
        if self._is_text:
            result["first_order"] = {name: total / len(labels) for name, total in along.items()}
        return result

    def fit(self, results: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
        """The mean over the batches, by their numbers of tokens, times the factor that gives the alphas the sum that
        noise in all layers has."""
        means = self._means(results, "alphas")
        total = sum(means.values())
        factor = sum(w * r["sum"] for w, r in self._weighted(results)) / total if total else 1.0
        return {name: (factor * mean, None) for name, mean in means.items()}

    def first_order(self, results: Mapping[str, Any]) -> dict[str, float]:
        """The mean over the batches, by their numbers of tokens."""
        return self._means(results, "first_order") if self._is_text else {}

    def relative_error(self, results: Mapping[str, Any]) -> float | None:
        """From how the batches differ; None if there is but one."""
        sums = [(w, r["sum"]) for w, r in self._weighted(results)]
        mean = sum(w * s for w, s in sums)
        if len(sums) < 2 or mean <= 0:
            return None
        return math.sqrt(sum((w * (s - mean)) ** 2 for w, s in sums) * len(sums) / (len(sums) - 1)) / mean

    def _means(self, results: Mapping[str, Any], key: str) -> dict[str, float]:
        return {name: sum(w * r[key].get(name, 0.0) for w, r in self._weighted(results)) for name in self._targets}

    def _weighted(self, results: Mapping[str, Any]) -> list[tuple[float, Any]]:
        """The share of each batch in the tokens that are predicted, and its result."""
        tokens = [ids.numel() - len(ids) for ids in self._ids]
        return [(t / sum(tokens), results[job]) for t, job in zip(tokens, self.jobs(), strict=True)]


def _draw_labels(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """One label for each row, drawn from its distribution on its device: int64 [rows, 1]. ``torch.multinomial`` with a
    generator of the CPU, which gives any device the same draw, takes longer there than passing through the model."""
    sums = log_probs.exp().cumsum(1)
    chosen = torch.rand(len(sums), 1, generator=generator).to(sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, chosen, right=True).clamp_(max=sums.shape[1] - 1)


def _noise_energy(gradient: Tensor, target: Target) -> float:
    """sum_ij (sigma_ij g_ij)^2"""
    return (gradient * target.noise_std()).square().sum(dtype=torch.float64).item()


def _along_weight(gradient: Tensor, target: Target) -> float:
    """<gradient, weight>"""
    return (gradient * target.linear.weight.detach().float()).sum(dtype=torch.float64).item()


def _backward(
    value: Tensor,
    targets: Mapping[str, Target],
    statistic: Callable[[Tensor, Target], float],
    *,
    retain_graph: bool = False,
) -> dict[str, float]:
    """{layer: statistic(gradient of ``value``, target)} of one backward pass, which keeps no gradient."""
    result: dict[str, float] = {}

    def take(name: str, target: Target) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            result[name] = statistic(weight.grad.float(), target)
            weight.grad = None

        return hook

    handles = [
        target.linear.weight.register_post_accumulate_grad_hook(take(name, target)) for name, target in targets.items()
    ]
    try:
        value.backward(retain_graph=retain_graph)
    finally:
        for handle in handles:
            handle.remove()
    return result


@contextmanager
def _gradients(model: nn.Module, targets: Mapping[str, Target]) -> Iterator[None]:
    """While open, the weights of the targets and no other parameters have gradients."""
    wanted = {id(target.linear.weight) for target in targets.values()}
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(id(p) in wanted)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


def check_levels(levels: Sequence[float]) -> None:
    if not levels or not all(0 < t2 <= 1 for t2 in levels):
        raise ValueError(f"levels {list(levels)} are not supported; use at least one t2 in (0, 1]")


class Noise:
    """The method *noise*; one job is one layer at one level of t2.

    ``objective`` "kl": mean KL(original || perturbed) over all positions, on any tokens; "loss": rise of the mean cross
    entropy of the text that the tokens are.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        token_ids: Tensor,
        *,
        objective: str = "kl",
        levels: Sequence[float] = LEVELS,
        seed: int = 0,
    ) -> None:
        """Raises ValueError for an unknown objective, no level, or a level not in (0, 1]."""
        if objective not in ("kl", "loss"):
            raise ValueError(f"objective {objective!r} is not supported; use 'kl' or 'loss'")
        check_levels(levels)
        self._model, self._targets, self._seed = model, targets, seed
        self._ids, self._levels, self._objective = _batches(token_ids), list(dict.fromkeys(levels)), objective
        self._base: list[Tensor] | None = None  # of the original model, made when first needed

    def jobs(self) -> list[str]:
        return [f"{name} {t2:g}" for name in self._targets for t2 in self._levels]

    @torch.inference_mode()
    def run(self, job: str) -> float:
        """The loss increase."""
        if self._base is None:
            self._base = [self._measure(ids) for ids in self._ids]
        name, t2 = job.rsplit(" ", 1)
        with perturbed(self._targets[name], float(t2), self._noise_seed(job)):
            total = sum(self._increase(i) for i in range(len(self._ids)))
        return total / sum(ids.numel() - len(ids) for ids in self._ids)

    def fit(self, results: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
        return {
            name: fit_line(self._levels, [results[f"{name} {t2:g}"] for t2 in self._levels]) for name in self._targets
        }

    def first_order(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Not known: noise has none."""
        return {}

    def relative_error(self, results: Mapping[str, Any]) -> None:
        """Not known: the residuals say how far from linear the layers are."""

    def _noise_seed(self, job: str) -> int:
        """Depends on the job alone, not on who does it when."""
        import hashlib

        return int.from_bytes(hashlib.sha256(f"{self._seed} {job}".encode()).digest()[:7], "little")

    def _measure(self, ids: Tensor) -> Tensor:
        """Log-probabilities of everything (kl) or of the text (loss)."""
        ids = ids.to(_device(self._model))
        log_probs = _log_probs(self._model, ids)
        return log_probs if self._objective == "kl" else log_probs.gather(2, ids[:, 1:, None])

    def _increase(self, i: int) -> float:
        """Summed over the positions of a batch."""
        assert self._base is not None
        base, now = self._base[i], self._measure(self._ids[i])
        return (base - now).sum(dtype=torch.float64).item() if self._objective == "loss" else _kl(base, now)


def _kl(base: Tensor, now: Tensor) -> float:
    """KL(base || now), summed over the positions; both are log-probabilities [..., vocabulary]."""
    return (base.exp() * (base - now)).sum(-1).sum(dtype=torch.float64).item()


@contextmanager
def perturbed(target: Target, t2: float, seed: int) -> Iterator[None]:
    """While open, the layer's weight carries noise of relative squared error ``t2``; afterwards its old bits."""
    weight = target.linear.weight
    before = weight.detach().clone()
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.copy_(before.float() + math.sqrt(t2) * target.noise_std() * noise)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@contextmanager
def jointly_perturbed(model: nn.Module, targets: Mapping[str, Target], t2: float, seed: int) -> Iterator[None]:
    """While open, all layers compute with noise of relative squared error ``t2``, each with its own. A weight carries
    it only while its module runs, so that no more than one is in memory twice."""
    seeds = torch.randint(2**62, (len(targets),), generator=torch.Generator().manual_seed(seed)).tolist()
    seeded = {id(target.linear.weight): (s, target) for s, target in zip(seeds, targets.values(), strict=True)}
    of_module: dict[nn.Module, list[tuple[int, Target]]] = {}
    for module in model.modules():
        own = [seeded[id(p)] for p in module._parameters.values() if id(p) in seeded]
        if own:
            of_module[module] = own
    stacks: dict[nn.Module, ExitStack] = {}

    def before(module: nn.Module, _: Any) -> None:
        stacks[module] = ExitStack()
        for its_seed, target in of_module[module]:
            stacks[module].enter_context(perturbed(target, t2, its_seed))

    def after(module: nn.Module, _: Any, __: Any) -> None:
        stacks.pop(module).close()

    handles = []
    for module in of_module:
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fit_line(t2: Sequence[float], increase: Sequence[float]) -> tuple[float, float]:
    """Least squares through the origin: (slope, root mean square of the deviations over that of the increases)."""
    slope = sum(x * y for x, y in zip(t2, increase, strict=True)) / sum(x * x for x in t2)
    deviation = math.sqrt(sum((y - slope * x) ** 2 for x, y in zip(t2, increase, strict=True)))
    size = math.sqrt(sum(y * y for y in increase))
    return slope, deviation / size if size else 0.0


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def find_targets(
    model: nn.Module, column_scales: Mapping[str, Tensor], *, lm_head: bool = False
) -> tuple[dict[str, Target], dict[str, str]]:
    """The layers to measure, and {layer: reason} for those that cannot be quantized. A head that is tied to the
    embedding gets a weight of its own, so that only the head is changed."""
    from . import _core
    from .energies import linear_layers

    layers: dict[str, nn.Linear | Projection] = {**linear_layers(model), **projections(model)}
    if lm_head:
        layers.update(_own_head(model))
    targets, skipped = {}, {}
    for name, linear in layers.items():
        k = linear.in_features
        if k % 64:
            skipped[name] = f"k = {k} is not a multiple of 64"
        else:
            group = _core.default_group(k, _core.default_block(k))
            targets[name] = Target(linear, group, column_scales.get(name))
    if not targets:
        raise UnsupportedError("the model has no Linear layer that can be quantized")
    return targets, skipped


def _own_head(model: Any) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UnsupportedError("the model has no output head that is a Linear layer")
    name = next(n for n, module in model.named_modules(remove_duplicate=False) if module is head)
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return {name: head}
