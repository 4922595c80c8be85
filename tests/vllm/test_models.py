"""Quantized models give the same greedy tokens in vLLM as in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import higgs
import pytest
import torch
import transformers
from engines import engine, expected_tokens, overrides, served_tokens
from higgs import HiggsLinear, HiggsQuantConfig
from test_transformers import SIZES, load, make
from torch import nn

GRIDS = ("p2_n256", "p1_n16", "p2_n1024", "p1_n256")
FAMILIES = (
    "llama", "llama-narrow", "qwen2-biases", "qwen3", "gemma3-tied-odd", "mistral", "phi3-fused", "opt",
)  # fmt: skip

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
         "up_proj": "gate_up_proj"}  # fmt: skip


def mixed(model: nn.Module) -> dict[str, str]:
    """Another grid for every layer, so that fused layers are mixed; the output head too, but of OPT: there vLLM does
    not ask for it."""
    names = [name for name, m in model.named_modules() if type(m) is nn.Linear and m.in_features % 64 == 0]
    if isinstance(model, transformers.OPTForCausalLM):
        names.remove("lm_head")
    return {name: GRIDS[i % len(GRIDS)] for i, name in enumerate(names)}


def quantized(path: Path, **options: Any) -> tuple[Path, nn.Module]:
    """Quantizes the model at ``path``; the new checkpoint and the model in it."""
    model = load(path)
    higgs.quantize_(model, **{"scales": "none", **options})
    model.save_pretrained(path / "quantized")
    return path / "quantized", model


def parts(model: nn.Module) -> dict[str, int]:
    """How many matrices each quantized layer of vLLM's model has."""
    return {name: len(m.higgs) for name, m in model.named_modules() if hasattr(m, "higgs")}


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_mixed_grids_and_column_scales(family: str, tmp_path: Path) -> None:
    original = load(make(family, tmp_path))
    path, model = quantized(tmp_path, allocation=mixed(original), scales="none" if family == "opt" else "random")
    expected = expected_tokens(model)
    assert len({tuple(tokens) for tokens in expected}) > 1
    with engine(path) as llm:
        assert served_tokens(llm) == expected
        counts = llm.apply_model(parts)[0]
    fused = {name: n for name, n in counts.items() if "qkv" in name or "gate_up" in name}
    assert counts.get("lm_head") == (None if family == "opt" else 1)
    assert len(fused) == (2 if family == "opt" else 4)
    assert all(n == (1 if family == "phi3-fused" else 3 if "qkv" in name else 2) for name, n in fused.items())


@pytest.mark.parametrize("family", ["llama", "qwen2-biases"])
def test_parts_of_one_grid_are_one_matrix(family: str, tmp_path: Path) -> None:
    path, model = quantized(make(family, tmp_path), bits=5, scales="random")
    with engine(path) as llm:
        assert served_tokens(llm) == expected_tokens(model)
        assert set(llm.apply_model(parts)[0].values()) == {1}


@pytest.mark.parametrize("grid", ["a2_b6", "t2_b5", "ch8", "p4_n256"])
def test_every_kind_of_grid(grid: str, tmp_path: Path) -> None:
    path, model = quantized(make("llama", tmp_path), grid=grid)
    with engine(path) as llm:
        assert served_tokens(llm) == expected_tokens(model)


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("llama", {"bits": 6, "seed": 3, "block": 64}),
        ("llama-narrow", {"allocation": {"lm_head": "p2_n1024", "model.layers.1.mlp.gate_proj": "p2_n256",
                                         "model.layers.1.mlp.up_proj": "p2_n64"}}),
        ("qwen2-biases", {"grid": "p2_n1024", "skip": ["down_proj", r"layers\.0\.mlp"]}),
        ("gemma3-tied-odd", {"bits": 6}),
        ("phi3-fused", {"bits": 5}),
        ("opt", {"bits": 6}),
    ],
)  # fmt: skip
def test_quantized_while_loading(family: str, plan: dict[str, Any], tmp_path: Path) -> None:
    model = load(make(family, tmp_path), quantization_config=HiggsQuantConfig(**plan))
    with engine(tmp_path, **overrides(**plan)) as llm:
        assert served_tokens(llm) == expected_tokens(model)
        served = llm.apply_model(stored)[0]
    expected: dict[str, list[torch.Tensor]] = {}
    for name in sorted(name for name, m in model.named_modules() if isinstance(m, HiggsLinear)):
        parent, dot, leaf = name.rpartition(".")
        fused = name if family == "phi3-fused" else f"{parent}{dot}{FUSED.get(leaf, leaf)}"
        expected.setdefault(fused, []).append(model.get_submodule(name).indices)
    assert expected.keys() == served.keys()
    for name, indices in expected.items():  # q, k, v in this order
        order = [1, 0, 2] if len(indices) == 3 else range(len(indices))
        flat = torch.cat([indices[i].flatten() for i in order])
        assert torch.equal(torch.cat([part.flatten() for part in served[name]])[: len(flat)], flat), name


def stored(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    return {name: [p.indices for p in m.higgs] for name, m in model.named_modules() if hasattr(m, "higgs")}


def test_compiled_and_not_confused_with_another_quantization_of_the_same_model(tmp_path: Path) -> None:
    """vLLM keeps compiled graphs in files; seeds and grids are constants in them."""
    path = make("qwen2-biases", tmp_path)
    for seed in (0, 1):
        options = {"allocation": mixed(load(path)), "seed": seed}
        model = load(path, quantization_config=HiggsQuantConfig(**options))
        with engine(path, enforce_eager=False, **overrides(**options)) as llm:
            assert served_tokens(llm) == expected_tokens(model)


def test_bfloat16(tmp_path: Path) -> None:
    """Runs; rounding differs, so tokens may."""
    path, model = quantized(make("qwen2-biases", tmp_path), bits=8)
    with engine(path, dtype="bfloat16") as llm:
        got = served_tokens(llm)
    assert sum(a[0] == b[0] for a, b in zip(got, expected_tokens(model), strict=True)) >= 2


def test_quantized_attention_beside_unquantized_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else 0.05)
    attention = {f"model.layers.{i}.self_attn.{p}_proj": "p2_n1024" for i in (0, 1) for p in "qkvo"}
    higgs.quantize_(model, allocation=attention, scales="none")
    model.save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        assert served_tokens(llm) == expected_tokens(model)
        assert parts_names(llm) == {"qkv_proj", "o_proj"}


def parts_names(llm: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in llm.apply_model(parts)[0]}


def test_plan_in_place_of_a_checkpoints_config(tmp_path: Path) -> None:
    """``hf_overrides={"quantization_config": {...}}``, as a checkpoint would say it, works too."""
    path = make("llama", tmp_path)
    plan = {"quant_method": "higgs_quant", "bits": 6}
    model = load(path, quantization_config=HiggsQuantConfig(bits=6))
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    with engine(path, hf_overrides={"quantization_config": plan}) as llm:
        assert served_tokens(llm) == expected_tokens(model)
