"""Quantized models give the same greedy tokens in vLLM as in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import higgs
import pytest
import torch
import transformers
from engines import engine, expected_tokens, make_deepseek, overrides, served_tokens
from higgs import HiggsLinear, HiggsQuantConfig
from higgs.checkpoint import quantize_checkpoint
from higgs.embedding import input_embedding
from higgs.energies import ROUTER
from higgs.linear import as_linear
from higgs.model import unquantized_layers
from higgs.moe import HiggsExperts
from test_moe import make as make_mixture
from test_transformers import load, make
from torch import nn

GRIDS = ("p2_n256", "p1_n16", "p2_n1024", "p1_n256", "p4_n4096")
# How many layers of vLLM's model are made of several of the checkpoint or, in Phi 3, of one.
FAMILIES = {
    "llama": 4, "llama-narrow": 4, "qwen2-biases": 4, "qwen3": 4, "gemma3-tied-odd": 4, "mistral": 4, "phi3-fused": 4,
    "opt": 2, "gpt2-conv1d": 0, "mixtral": 2, "qwen3-moe": 2,
}  # fmt: skip

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
         "up_proj": "gate_up_proj"}  # fmt: skip


def mixed(model: nn.Module) -> dict[str, str]:
    """Another grid for every layer but gates and the embedding, so that fused layers are mixed; the output head too,
    but of OPT: there vLLM does not ask for it."""
    layers = {name: as_linear(layer) for name, layer in unquantized_layers(model).items() if not ROUTER.search(name)}
    embedding = input_embedding(model)
    names = [name for name, layer in layers.items() if layer.in_features % 64 == 0 and name != embedding]
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
    return {name.removesuffix(".routed_experts"): len([*m.higgs.children()]) for name, m in with_higgs(model)}


def with_higgs(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "higgs")]


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
    assert len(fused) == FAMILIES[family]
    assert all(n == (1 if family == "phi3-fused" else 3 if "qkv" in name else 2) for name, n in fused.items())
    assert sum(name.endswith("experts") for name in counts) == (2 if family in ("mixtral", "qwen3-moe") else 0)


def test_experts_beside_a_shared_one_and_a_dense_layer(tmp_path: Path) -> None:
    original = load(make_mixture("qwen2_moe", tmp_path))
    path, model = quantized(tmp_path, allocation=mixed(original), scales="random")
    with engine(path) as llm:
        assert served_tokens(llm) == expected_tokens(model)
        counts = llm.apply_model(parts)[0]
    assert {name.split(".", 3)[3] for name in counts if ".mlp." in name} == {
        "mlp.experts", "mlp.shared_expert.gate_up_proj", "mlp.shared_expert.down_proj", "mlp.gate_up_proj",
        "mlp.down_proj",
    }  # fmt: skip


def test_latent_attention(tmp_path: Path) -> None:
    """Of which vLLM wants to see a weight."""
    path, model = quantized(make_deepseek(tmp_path), bits=4, skip=["experts"])
    with engine(path) as llm:
        assert served_tokens(llm) == expected_tokens(model)
    _, model = quantized(tmp_path, bits=4)
    with engine(tmp_path, **overrides(bits=4)) as llm:
        assert served_tokens(llm) == expected_tokens(model)


@pytest.mark.parametrize("family", ["llama", "qwen2-biases"])
def test_parts_of_one_grid_are_one_matrix(family: str, tmp_path: Path) -> None:
    path, model = quantized(make(family, tmp_path), bits=5, scales="random")
    with engine(path) as llm:
        assert served_tokens(llm) == expected_tokens(model)
        assert set(llm.apply_model(parts)[0].values()) == {1}


@pytest.mark.parametrize("grid", ["a2_b6", "t2_b5", "ch8", "p4_n256", "p4_n4096"])
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
        ("gpt2-conv1d", {"bits": 6}),
        ("mixtral", {"bits": 6, "seed": 5}),
        ("qwen3-moe", {"grid": "p2_n1024", "skip": [r"layers\.1\.mlp"]}),
    ],
)  # fmt: skip
def test_quantized_while_loading(family: str, plan: dict[str, Any], tmp_path: Path) -> None:
    model = load(make(family, tmp_path), quantization_config=HiggsQuantConfig(**plan))
    with engine(tmp_path, **overrides(**plan)) as llm:
        assert served_tokens(llm) == expected_tokens(model)
        found = llm.apply_model(stored)[0]
    expected: dict[str, list[torch.Tensor]] = {}
    for name in sorted(name for name, m in model.named_modules() if isinstance(m, HiggsLinear)):
        parent, dot, leaf = name.rpartition(".")
        expected.setdefault(f"{parent}{dot}{FUSED.get(leaf, leaf)}", []).append(model.get_submodule(name).indices)
    assert expected.keys() == found.keys()
    for name, indices in expected.items():  # q, k, v in this order
        order = [1, 0, 2] if len(indices) == 3 else range(len(indices))
        flat = torch.cat([indices[i].flatten() for i in order])
        assert torch.equal(torch.cat([part.flatten() for part in found[name]])[: len(flat)], flat), name


def stored(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The indices of every quantized layer, which goes by its name in transformers."""
    result = {}
    for name, m in with_higgs(model):
        if isinstance(m.higgs, HiggsExperts):
            name = name.replace("block_sparse_moe", "mlp").removesuffix(".routed_experts")
            result.update({f"{name}.{part}": [getattr(m.higgs, part).indices] for part in ("gate_up", "down")})
        else:
            result[name] = [part.indices for part in m.higgs]
    return result


@pytest.mark.parametrize("family", ["qwen2-biases", "mixtral", "gpt2-conv1d"])
def test_compiled_and_not_confused_with_another_quantization_of_the_same_model(family: str, tmp_path: Path) -> None:
    """vLLM keeps compiled graphs in files; seeds and grids are constants in them."""
    path = make(family, tmp_path)
    for seed in (0, 1):
        options = {"bits": 6, "seed": seed} if family == "mixtral" else {"allocation": mixed(load(path)), "seed": seed}
        model = load(path, quantization_config=HiggsQuantConfig(**options))
        with engine(path, enforce_eager=False, **overrides(**options)) as llm:
            assert served_tokens(llm) == expected_tokens(model)


@pytest.mark.parametrize("family", ["qwen2-biases", "mixtral"])
def test_bfloat16(family: str, tmp_path: Path) -> None:
    """Runs; rounding differs, so tokens may."""
    path, model = quantized(make(family, tmp_path), bits=8)
    with engine(path, dtype="bfloat16") as llm:
        got = served_tokens(llm)
    assert sum(a[0] == b[0] for a, b in zip(got, expected_tokens(model), strict=True)) >= 2


@pytest.mark.parametrize(("chosen", "expected"), [("self_attn", {"qkv_proj", "o_proj"}), ("experts", {"experts"})])
def test_only_attention_or_only_experts(chosen: str, expected: set[str], tmp_path: Path) -> None:
    names = [name for name in unquantized_layers(load(make("mixtral", tmp_path))) if chosen in name]
    path, model = quantized(tmp_path, allocation=dict.fromkeys(names, "p2_n1024"))
    with engine(path) as llm:
        assert served_tokens(llm) == expected_tokens(model)
        assert parts_names(llm) == expected


def test_experts_that_were_quantized_from_file_to_file(tmp_path: Path) -> None:
    quantize_checkpoint(make("mixtral", tmp_path / "original"), tmp_path / "quantized", bits=4)
    with engine(tmp_path / "quantized") as llm:
        assert served_tokens(llm) == expected_tokens(load(tmp_path / "quantized"))
        assert "experts" in parts_names(llm)


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
