"""Perplexity, KL divergence, lm-eval tasks and text generation of a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .devices import pick_device
from .errors import HiggsError
from .linear import HiggsLinear, as_linear
from .model import dequantize_
from .progress import NullProgress, Progress


def load(
    model_dir: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Any]:
    """Model (eval mode, ``dtype``) and tokenizer of a local checkpoint directory, quantized or not."""
    model = load_model(model_dir, dtype, device)
    from transformers import AutoTokenizer

    return model, AutoTokenizer.from_pretrained(model_dir)


def load_model(
    model_dir: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> nn.Module:
    """The model of :func:`load` alone."""
    if not Path(model_dir).is_dir():
        raise FileNotFoundError(f"no model directory at {model_dir}; only local directories are read")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        raise HiggsError("running a model needs transformers: pip install transformers") from e
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval().to(device)


def read_text(path: str | Path) -> str:
    """A text file as the evaluation sees it.

    A file in WikiText's layout (a line per row, `` = Title = `` headings) is joined as everyone does: rows, each with
    its newline, separated by two newlines. Any other file is taken as it is.
    """
    try:
        text = Path(path).read_text(encoding="utf8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is no text in UTF-8: {e}") from None
    lines = text.split("\n")[:-1]
    if not any(line.startswith(" = ") and line.rstrip().endswith(" =") for line in lines[:10]):
        return text
    return "\n\n".join("" if not line.strip() else line + "\n" for line in lines)


def token_windows(tokenizer: Any, text: str, context: int, windows: int | None) -> Tensor:
    """Non-overlapping windows of ``text``, tokenized once without special tokens: int64 [windows, context]."""
    if context < 2:
        raise ValueError(f"context {context} is not supported; use at least 2")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    available = len(ids) // context
    wanted = available if windows is None else windows
    if not 1 <= wanted <= available:
        raise ValueError(f"windows {wanted} of {context} tokens: the text has {len(ids)} tokens, use 1 to {available}")
    return ids[: wanted * context].view(wanted, context)


def bos_windows(tokenizer: Any, text: str, context: int, windows: int | None) -> Tensor:
    """Windows that each start with BOS, for models that were trained so: int64 [windows, context]."""
    body = token_windows(tokenizer, text, context - 1, windows)
    return torch.cat([torch.full((len(body), 1), tokenizer.bos_token_id), body], 1)


@torch.inference_mode()
def score(
    model: nn.Module, token_ids: Tensor, base: nn.Module | None = None, progress: Progress | None = None
) -> dict[str, float | None]:
    """Mean next-token cross entropy over ``token_ids`` [windows, context], each window on its own.

    ``perplexity`` = exp(mean), ``kl`` = mean over scored positions of KL(base || model) in nats (None without base),
    ``tokens_per_s`` = scored tokens over the time of the forward passes of ``model``.
    """
    progress = progress or NullProgress()
    nll = kl = seconds = 0.0
    count = 0
    token_ids = token_ids.to(next(model.parameters()).device)
    progress.start("perplexity", len(token_ids))
    for window in token_ids:
        start = time.perf_counter()
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        seconds += time.perf_counter() - start
        log_probs = logits.log_softmax(-1)
        nll -= log_probs.gather(1, window[1:, None]).double().sum().item()
        if base is not None:
            reference = base(window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            if reference.shape != log_probs.shape:
                raise ValueError(f"base has {reference.shape[1]} tokens, the model {log_probs.shape[1]}")
            kl += (reference.exp() * (reference - log_probs)).sum(-1).double().sum().item()
        count += len(window) - 1
        progress.advance()
    progress.finish()
    return {
        "perplexity": math.exp(nll / count),
        "kl": None if base is None else kl / count,
        "tokens_per_s": count / seconds,
    }


def effective_bits(model: nn.Module) -> float:
    """Bits per weight of the Linear layers (the output head excepted unless it is quantized), scales counted."""
    from .energies import quantizable_layers

    bits = weights = 0.0
    for module in model.modules():
        if isinstance(module, HiggsLinear):
            n = module.in_features * module.out_features
            bits += module.bits() * n
            weights += n
    for layer in quantizable_layers(model).values():
        weight = as_linear(layer).weight
        bits += 8 * weight.element_size() * weight.numel()
        weights += weight.numel()
    return bits / weights if weights else 0.0


def evaluate(
    model_dir: str | Path,
    text_path: str | Path,
    context: int = 2048,
    windows: int | None = None,
    base: str | Path | None = None,
    bos: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of a checkpoint on a text (fp32 arithmetic), and KL(base || model) if ``base`` is a checkpoint.

    Keys: perplexity, tokens_per_s, bits, kl, windows, context. ``bos``: every window is BOS plus context - 1 tokens.
    ``device``: see :func:`~higgs.devices.pick_device`.
    """
    chosen = pick_device(device)
    model, tokenizer = load(model_dir, device=chosen)
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos: the tokenizer has no BOS token")
    ids = (bos_windows if bos else token_windows)(tokenizer, read_text(text_path), context, windows)
    base_model = load_model(base, device=chosen) if base is not None else None
    result: dict[str, Any] = score(model, ids, base_model, progress)
    return {**result, "bits": effective_bits(model), "windows": len(ids), "context": context}


@torch.no_grad()
def mirror_(model: nn.Module, original: nn.Module) -> nn.Module:
    """Dequantizes ``model`` in place and gives the errors of its weights the other sign, W - (W^ - W); returns it.

    Half the sum of the loss increases of a quantized model and of its mirror image is free of the first-order term, the
    luck of one draw of rounding errors, and is what the linearity theorem predicts (up to fourth order)."""
    dequantize_(model)
    for name, p in model.named_parameters():
        p.copy_(2 * original.get_parameter(name) - p)  # exactly p where nothing was quantized
    return model


def mirror_perplexity(
    model_dir: str | Path,
    base_dir: str | Path,
    text_path: str | Path,
    context: int = 2048,
    windows: int | None = None,
    progress: Progress | None = None,
) -> float:
    """Perplexity (fp32 arithmetic) of the mirror image (:func:`mirror_`) of the checkpoint ``model_dir``, made from
    ``base_dir``, on the windows of :func:`evaluate`."""
    model, tokenizer = load(model_dir)
    mirror_(model, load_model(base_dir))
    ids = token_windows(tokenizer, read_text(text_path), context, windows)
    return cast(float, score(model, ids, progress=progress)["perplexity"])


def evaluate_tasks(
    model_dir: str | Path,
    tasks: Sequence[str],
    *,
    task_dir: str | Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 1,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Results of lm-eval (``pip install lm-eval``) for a checkpoint: {task: {"metric,filter": value}}.

    ``tasks``: names that lm-eval knows, or of YAML files in ``task_dir``. ``limit``: documents of each task.
    ``few_shot``: examples in the prompt, if not what the task says. fp32 arithmetic on the CPU, bfloat16 on a CUDA
    device. Raises HiggsError without lm-eval, ValueError for tasks that it does not know.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise HiggsError(f"tasks need lm-eval: pip install 'higgs-quant[eval]' ({e})") from e
    manager = TaskManager(include_path=None if task_dir is None else str(task_dir))
    known = set(manager.all_tasks)
    unknown = [task for task in tasks if task not in known]
    if unknown or not tasks:
        where = "" if task_dir is None else f" and {task_dir} has not"
        raise ValueError(
            f"tasks {', '.join(unknown) or '(none)'}: lm-eval has no such tasks{where}; see `lm-eval ls tasks`"
        )
    chosen = pick_device(device)
    model, tokenizer = load(model_dir, torch.float32 if chosen.type == "cpu" else torch.bfloat16, chosen)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        lm, tasks=list(tasks), limit=limit, num_fewshot=few_shot, task_manager=manager, log_samples=False,
        bootstrap_iters=1000,
    )  # fmt: skip
    return {task: {k: v for k, v in metrics.items() if k != "alias"} for task, metrics in found["results"].items()}


@torch.inference_mode()
def generate_tokens(
    model: nn.Module, prompt_ids: Tensor, new_tokens: int, progress: Progress | None = None
) -> tuple[Tensor, float]:
    """Greedy continuation of ``prompt_ids`` [1, length]; returns all ids and decoded tokens per second."""
    progress = progress or NullProgress()
    progress.start("generate", new_tokens)
    cache = None
    ids = next_ids = prompt_ids.to(next(model.parameters()).device)
    stop = _eos_ids(model)
    decoded = 0
    start = time.perf_counter()
    for step in range(new_tokens):
        output = model(next_ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        next_ids = output.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, next_ids], 1)
        progress.advance()
        if step == 0:
            start = time.perf_counter()  # the prompt is not counted
        else:
            decoded += 1
        if next_ids.item() in stop:
            break
    progress.finish()
    return ids, decoded / max(time.perf_counter() - start, 1e-9)


def _eos_ids(model: Any) -> set[int]:
    eos = getattr(model, "generation_config", model.config).eos_token_id
    return set(eos) if isinstance(eos, Iterable) else {eos} if eos is not None else set()


def generate(
    model_dir: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    device: str = "cpu",
    progress: Progress | None = None,
) -> str:
    """Greedy continuation of ``prompt`` by the checkpoint in ``model_dir``; returns prompt and continuation.

    ``device``: see :func:`~higgs.devices.pick_device`; fp32 arithmetic on the CPU, bfloat16 on a CUDA device.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} is not supported; use at least 1")
    chosen = pick_device(device)
    model, tokenizer = load(model_dir, torch.float32 if chosen.type == "cpu" else torch.bfloat16, chosen)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty and the tokenizer has no BOS token")
    out, _ = generate_tokens(model, ids, max_new_tokens, progress)
    return tokenizer.decode(out[0], skip_special_tokens=True)
