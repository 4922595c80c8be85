"""Two ranks of tensor parallelism give the tokens of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import engine, expected_tokens, overrides, served_tokens
from higgs import HiggsQuantConfig
from test_models import mixed, quantized
from test_transformers import OPT, SIZES, load
from torch import nn

# Both ranks have the one k and v head of the first; the second has biases where inputs are split.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 1, "vocab_size": 263, "hidden_size": 256, "intermediate_size": 512},
    "OPT": {**OPT, "hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 512},
}


def save(kind: str, path: Path) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **MODELS[kind]})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else 0.05)
    model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


def test_stored(tmp_path: Path) -> None:
    original = load(save("Llama", tmp_path))
    path, model = quantized(tmp_path, allocation=mixed(original), scales="random", block=64, group=128)
    with engine(path, tensor_parallel_size=2) as llm:
        assert served_tokens(llm) == expected_tokens(model)


def test_quantized_while_loading(tmp_path: Path) -> None:
    """With a block that fits both, one rank and two have the same bits."""
    path, plan = save("OPT", tmp_path), {"bits": 6, "block": 64, "group": 128}
    model = load(path, quantization_config=HiggsQuantConfig(**plan))
    with engine(path, tensor_parallel_size=2, **overrides(**plan)) as llm:
        assert served_tokens(llm) == expected_tokens(model)
