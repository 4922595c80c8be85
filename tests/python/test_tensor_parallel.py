"""Tensor parallelism in transformers: two ranks on the CPU say what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import higgs
import pytest
import torch
import transformers
from conftest import load, torchrun
from torch import nn
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).parent / "tensor_parallel_ranks.py"
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def quantized(path: Path, family: str, **options: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**SIZES))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else 0.05)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    higgs.quantize_(model, allocation=dict.fromkeys(names, "p2_n256"), **options)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_two_ranks_say_what_one_does(family: str, tmp_path: Path) -> None:
    path = quantized(tmp_path / "q", family, scales="random", block=64, group=64)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.arange(20)[None] * 5 % 256
    logits = model(ids).logits
    logits.square().mean().backward()
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    code, _, err = torchrun(SCRIPT, path, tmp_path)
    assert code == 0, err
    for rank in (0, 1):
        found, generated, gradient, formats, refused = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.allclose(found, logits, rtol=1e-4, atol=1e-5) and torch.equal(generated, tokens)
        assert torch.allclose(gradient, model.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-7)
        q, o = (formats[f"model.layers.1.self_attn.{name}"] for name in ("q_proj", "o_proj"))
        assert (q["n"], q["k"], o["n"], o["k"]) == (128, 256, 256, 128)
        assert refused == ["a shard of tensor parallelism cannot be dequantized; load the model without"]
    saved, original = load(tmp_path / "saved"), load(path)
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)


def test_a_shard_that_cuts_a_scale_group_is_refused(tmp_path: Path) -> None:
    path = quantized(tmp_path / "q", "Llama", scales="none")
    code, _, err = torchrun(SCRIPT, path, tmp_path)
    assert code != 0
    assert "layer model.layers.0.self_attn.o_proj in 2 ranks of tensor parallelism: columns 0 to 128 of 256" in err
    assert "a shard starts and ends at a multiple of 256 columns" in err
