"""Experts of a mixture: the operator, the module, and models of transformers that have them."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import higgs
import pytest
import torch
import transformers
from higgs import HiggsQuantConfig, _grouped
from higgs.checkpoint import inspect_checkpoint
from higgs.moe import HiggsExperts, HiggsGrouped
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(20)[None] * 5 % 256
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 16, "moe_intermediate_size": 64, "num_experts_per_tok": 4}),
    # a shared expert, and a dense layer
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 6, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128,
                               "mlp_only_layers": [1]}),
}  # fmt: skip


def make(family: str, path: Path, **sizes: Any) -> Path:
    kind, own = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **sizes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else 0.05)
    model.save_pretrained(path)
    return path


def load(path: Path, **kwargs: Any) -> PreTrainedModel:
    """Nothing missing, nothing unexpected."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def experts_of(model: nn.Module) -> dict[str, HiggsExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, HiggsExperts)}


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).int()
