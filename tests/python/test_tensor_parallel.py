"""Tensor and expert parallelism in transformers: two ranks on the CPU say what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import higgs
import pytest
import torch
import transformers
from conftest import load, torchrun
from higgs.integrations.transformers import HiggsHfQuantizer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).parent / "tensor_parallel_ranks.py"
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHARDS = {  # by family and whether experts stay whole, of gate_up and down: [rows of all experts, columns]
    ("Mixtral", False): ((4 * 512, 256), (4 * 256, 256)),
    ("Qwen3Moe", False): ((6 * 256, 256), (6 * 256, 128)),
    ("Qwen3Moe", True): ((3 * 512, 256), (3 * 256, 256)),
}


def quantized(path: Path, family: str, num_local_experts: int = 4, grid: str = "p2_n256", **options: Any) -> Path:
    experts = {
        "Mixtral": {"num_local_experts": num_local_experts},
        "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 256, "num_experts_per_tok": 3},
    }.get(family, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**SIZES, **experts))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else 0.05)
    higgs.quantize_(model, grid=grid, lm_head_grid="p2_n256", **options)
    model.save_pretrained(path)
    return path


def check_ranks(path: Path, out: Path, *options: str) -> list[dict]:
    """Runs two ranks, which must say what one process says and save what it loaded; returns the formats of each."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.arange(20)[None] * 5 % 256
    logits = model(ids).logits
    logits.square().mean().backward()
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    code, _, err = torchrun(SCRIPT, path, out, *options)
    assert code == 0, err
    formats = []
    for rank in (0, 1):
        found, generated, gradient, formats_of_rank, refused = torch.load(out / f"rank{rank}.pt")
        assert torch.allclose(found, logits, rtol=1e-4, atol=1e-5) and torch.equal(generated, tokens)
        assert torch.allclose(gradient, model.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-7)
        assert refused == ["a shard of tensor parallelism cannot be dequantized; load the model without"]
        formats.append(formats_of_rank)
    saved, original = load(out / "saved"), load(path)
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    return formats


@pytest.mark.parametrize(("family", "grid"), [("Llama", "p2_n256"), ("Qwen2", "p4_n4096")])
def test_two_ranks_say_what_one_does(family: str, grid: str, tmp_path: Path) -> None:
    path = quantized(tmp_path / "q", family, grid=grid, scales="random", block=64, group=64)
    for formats in check_ranks(path, tmp_path):
        q, o = (formats[f"model.layers.1.self_attn.{name}"] for name in ("q_proj", "o_proj"))
        assert (q["n"], q["k"], o["n"], o["k"]) == (128, 256, 256, 128)


@pytest.mark.parametrize(("family", "whole"), SHARDS)
def test_experts(family: str, whole: bool, tmp_path: Path) -> None:
    grid = "p4_n4096" if whole else "p2_n256"
    path = quantized(tmp_path / "q", family, grid=grid, scales="random", block=64, group=64)
    for formats in check_ranks(path, tmp_path, *(["experts"] if whole else [])):
        gate_up, down = (formats[f"model.layers.1.mlp.experts.{name}"] for name in ("gate_up", "down"))
        assert ((gate_up["n"], gate_up["k"]), (down["n"], down["k"])) == SHARDS[family, whole]


def test_a_shard_that_cuts_a_scale_group_is_refused(tmp_path: Path) -> None:
    path = quantized(tmp_path / "q", "Llama", scales="none")
    code, _, err = torchrun(SCRIPT, path, tmp_path)
    assert code != 0
    assert "layer model.layers.0.self_attn.o_proj in 2 ranks of tensor parallelism: columns 0 to 128 of 256" in err
    assert "a shard starts and ends at a multiple of 256 columns" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_size": 2}, "fsdp_size = 2 is not supported for quantized models; use tp_plan or tp_size"),
        ({"tp_plan": {"model.layers.*.mlp.experts.down_proj": "packed_rowwise"}},
         r"model.layers.0.mlp.experts.down cannot be sharded by 'packed_rowwise'; only by packed_colwise, rowwise"),
    ],
)  # fmt: skip
def test_other_plans_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(quantized(tmp_path / "q", "Mixtral", scales="none"))
    config.distributed_config = DistributedConfig(**options)
    quantizer = HiggsHfQuantizer(higgs.HiggsQuantConfig(**config.quantization_config), pre_quantized=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(higgs.UnsupportedError, match=message):
        quantizer._process_model_before_weight_loading(model)


def test_experts_that_ranks_cannot_share_are_refused(tmp_path: Path) -> None:
    path = quantized(tmp_path / "q", "Mixtral", scales="none", num_local_experts=3)
    code, _, err = torchrun(SCRIPT, path, tmp_path, "experts")
    assert code != 0
    assert "layer model.layers.0.mlp.experts.gate_up: 2 ranks cannot share 3 experts" in err
