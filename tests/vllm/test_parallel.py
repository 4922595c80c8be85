"""Two ranks give the tokens and logits of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import assert_same_logits, engine, overrides
from higgs import HiggsQuantConfig
from test_models import mixed, quantized
from test_transformers import OPT, SIZES, load, save_random
from transformers import AutoModelForCausalLM

WIDE: dict[str, Any] = {**SIZES, "hidden_size": 256, "intermediate_size": 512}
# Both ranks have the one k and v head of Llama and Qwen 3; OPT has biases where inputs are split; GPT-2 has q, k and v
# in one layer; of 5 experts one rank has 3.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {**WIDE, "num_key_value_heads": 1, "vocab_size": 263},
    "OPT": {**WIDE, **OPT, "word_embed_proj_dim": 256, "ffn_dim": 512},
    "GPT2": {**WIDE, "n_inner": 512},
    "Mixtral": {**WIDE, "num_local_experts": 5},
    "Qwen3Moe": {**WIDE, "num_key_value_heads": 1, "num_experts": 6, "num_experts_per_tok": 3,
                 "moe_intermediate_size": 256},
}  # fmt: skip
# Fits the columns of two ranks: one rank and two have the same bits.
FITS: dict[str, Any] = {"block": 64, "group": 128}
SPLIT: dict[str, dict[str, Any]] = {
    "tensors": {},
    "experts": {"enable_expert_parallel": True},
    "experts in turn": {"enable_expert_parallel": True, "expert_placement_strategy": "round_robin"},
}


def save(kind: str, path: Path) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind])
    return save_random(AutoModelForCausalLM.from_config(config), path)


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("Llama", "tensors"),
        ("GPT2", "tensors"),
        ("Mixtral", "tensors"),
        ("Mixtral", "experts"),
        ("Qwen3Moe", "tensors"),
    ],
)
def test_stored(kind: str, split: str, tmp_path: Path) -> None:
    original = load(save(kind, tmp_path))
    path, model = quantized(tmp_path, allocation=mixed(original), scales="random", **FITS)
    with engine(path, tensor_parallel_size=2, max_logprobs=-1, **SPLIT[split]) as llm:
        assert_same_logits(llm, model)


@pytest.mark.parametrize(
    ("kind", "split"), [("OPT", "tensors"), ("Mixtral", "tensors"), ("Qwen3Moe", "experts in turn")]
)
def test_quantized_while_loading(kind: str, split: str, tmp_path: Path) -> None:
    path, plan = save(kind, tmp_path), {"bits": 6, **FITS}
    model = load(path, quantization_config=HiggsQuantConfig(**plan))
    with engine(path, tensor_parallel_size=2, max_logprobs=-1, **SPLIT[split], **overrides(**plan)) as llm:
        assert_same_logits(llm, model)
