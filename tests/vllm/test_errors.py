"""What cannot be served says so before it serves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import higgs
import pytest
import torch
import transformers
from engines import engine, make_deepseek, overrides
from higgs import FormatError, UnsupportedError
from higgs.integrations.vllm_experts import refuse_unsupported
from safetensors.torch import load_file, save_file
from test_transformers import SIZES, load, make
from vllm.model_executor.layers.fused_moe.activation import MoEActivation


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def stored(source: Path, tmp_path: Path) -> Path:
    return store(source, tmp_path, "random")


def store(source: Path, path: Path, scales: str) -> Path:
    model = load(source)
    higgs.quantize_(model, bits=4, scales=scales)
    model.save_pretrained(path)
    return path


def refused(path: Path, error: type[Exception], message: str, **options: Any) -> None:
    with pytest.raises(error, match=message), engine(path, **options):
        pass


def edit_config(path: Path, edit: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))


def edit_tensors(path: Path, edit: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_unknown_version(stored: Path) -> None:
    edit_config(stored, lambda config: config.update(format_version=99))
    refused(stored, FormatError, r"format_version of the checkpoint is 99, this version of higgs reads 1")


@pytest.mark.parametrize("tensor", ["indices", "scales", "column_scale"])
def test_missing_tensor(stored: Path, tensor: str) -> None:
    name = f"model.layers.1.self_attn.k_proj.{tensor}"
    edit_tensors(stored, lambda tensors: tensors.pop(name))
    refused(stored, FormatError, f"the checkpoint has no tensor {name}")


def test_wrong_shape_dtype_and_values(stored: Path) -> None:
    original = load_file(stored / "model.safetensors")

    def refuse(name: str, tensor: torch.Tensor, message: str) -> None:
        save_file({**original, name: tensor}, stored / "model.safetensors", {"format": "pt"})
        refused(stored, FormatError, message)

    indices = "model.layers.0.mlp.down_proj.indices"
    refuse(indices, original[indices][:, :-1].contiguous(), rf"{indices} is torch.uint8 \[128, 95\], expected .*, 96\]")
    scales = "model.layers.0.self_attn.q_proj.scales"
    refuse(scales, original[scales].float(), rf"{scales} is torch.float32 .*, expected torch.float16")
    refuse(scales, original[scales] * float("nan"), rf"{scales} holds NaN, inf or negative values")


def test_half_of_a_fused_layer(stored: Path) -> None:
    edit_config(stored, lambda config: config["layers"].pop("model.layers.0.mlp.up_proj"))
    message = r"layers.0.mlp.gate_proj is quantized and model.layers.0.mlp.up_proj is not, but vLLM fuses them"
    refused(stored, UnsupportedError, message)


def test_layer_that_the_model_does_not_have(stored: Path) -> None:
    entry = {"grid": "p2_n256", "block": 64, "group": 64, "seed": 0}
    edit_config(stored, lambda config: config["layers"].update({"model.layers.7.mlp.up_proj": entry}))
    refused(stored, FormatError, r"names model.layers.7.mlp.up_proj \(1 such\), which vLLM does not have")


def test_embedding(source: Path, tmp_path: Path) -> None:
    model = load(source)
    higgs.quantize_(model, bits=4, scales="none", lm_head_grid="ch8", embedding_grid="p2_n256")
    model.save_pretrained(tmp_path)
    refused(tmp_path, UnsupportedError, "model.embed_tokens: quantized embeddings are not supported in vLLM")


def test_nothing_says_how_to_quantize(source: Path) -> None:
    message = r'(?s)not quantized, and nothing says how.*hf_overrides={"quantization_config": .*"bits": 4'
    refused(source, ValueError, message, quantization="higgs_quant")


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"bits": 4, "scales": "self"}, UnsupportedError, "scales='self' needs the whole model"),
        ({"bits": 4, "grid": "p2_n256"}, ValueError, "exactly one of bits, grid and allocation"),
        ({"bits": 7.7}, ValueError, "7.7"),
        ({"bits": 4, "speed": 9}, TypeError, "does not take speed"),
        ({"bits": 4, "block": 96}, ValueError, "block 96"),
        ({"allocation": {"model.layers.9.mlp.up_proj": "p2_n256"}}, FormatError, "names model.layers.9.mlp.up_proj"),
    ],
)
def test_bad_plan(source: Path, plan: dict[str, Any], error: type[Exception], message: str) -> None:
    if "allocation" in plan:
        plan["allocation"] = {"model.layers.0.mlp.down_proj": "p2_n256", **plan["allocation"]}
    refused(source, error, message, **overrides(**plan))


def test_strict(tmp_path: Path) -> None:
    path = make("llama-narrow", tmp_path / "dense")
    message = r"down_proj is not quantized: in_features = 172 on each rank is not a multiple of 64"
    refused(path, UnsupportedError, message, **overrides(bits=4, strict=True))
    config = transformers.MixtralConfig(**{**SIZES, "intermediate_size": 96}, num_local_experts=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixture")
    message = r"experts.down is not quantized: in_features = 96 on each rank is not a multiple of 64"
    refused(tmp_path / "mixture", UnsupportedError, message, **overrides(bits=4, strict=True))


def test_weights_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    model = load(source)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    refused(tmp_path, ValueError, r"self_attn.v_proj: weight \[3, 5\] is nan", **overrides(bits=4))


EXPERTS = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def stored_mixture(mixture: Path, tmp_path: Path) -> Path:
    return store(mixture, tmp_path, "none")


def test_experts_that_the_config_describes_wrongly(stored_mixture: Path) -> None:
    edit_config(stored_mixture, lambda config: config["layers"][f"{EXPERTS}.down"].update(experts=8))
    refused(stored_mixture, FormatError, rf"quantization_config of {EXPERTS}.down says 8 experts, there are 4")
    edit_config(stored_mixture, lambda config: config["layers"].pop(f"{EXPERTS}.down"))
    refused(stored_mixture, ValueError, "experts.gate_up is to be quantized, .*experts.down is not: take both or none")


def test_tensors_of_experts(stored_mixture: Path) -> None:
    tensors = load_file(stored_mixture / "model.safetensors")
    scales = tensors.pop(f"{EXPERTS}.down.scales")
    save_file(tensors, stored_mixture / "model.safetensors", {"format": "pt"})
    refused(stored_mixture, FormatError, f"the checkpoint has no tensor {EXPERTS}.down.scales")
    save_file({**tensors, f"{EXPERTS}.down.bias": scales}, stored_mixture / "model.safetensors", {"format": "pt"})
    refused(stored_mixture, FormatError, r"experts.gate_up, .*experts.down have an unexpected tensor down.bias")


def test_stored_experts_that_the_model_of_vllm_does_not_read(tmp_path: Path) -> None:
    path = store(make_deepseek(tmp_path / "o"), tmp_path, "none")
    message = r"layers.1.mlp.experts: DeepseekV2ForCausalLM of vLLM does not read stored experts of deepseek_v2; serve"
    refused(path, UnsupportedError, message)


def test_weights_of_experts(mixture: Path, tmp_path: Path) -> None:
    load(mixture).save_pretrained(tmp_path)
    original, name = load_file(tmp_path / "model.safetensors"), f"{EXPERTS}.2.w3.weight"
    edit_tensors(tmp_path, lambda tensors: tensors[name].index_fill_(0, torch.tensor([7]), float("inf")))
    message = rf"layer {EXPERTS}.gate_up \(expert 2 of this rank\): weight \[7, 0\] is inf"
    refused(tmp_path, ValueError, message, **overrides(bits=4))
    save_file({**original, name: original[name][:-1].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, FormatError, r"expert's weight is \[191, 128\], expected \[192, 128\]", **overrides(bits=4))
    del original[name]
    save_file(original, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, FormatError, f"lacks 1 of the weights of {EXPERTS}.gate_up", **overrides(bits=4))


def test_one_projection_of_experts(mixture: Path) -> None:
    message = "experts.down is to be quantized, .*experts.gate_up is not: take both or none"
    refused(mixture, ValueError, message, **overrides(allocation={f"{EXPERTS}.down": "p2_n256"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"has_bias": True}, "experts with biases"),
        ({"activation": MoEActivation.SWIGLUOAI}, "experts with the activation swigluoai"),
        ({"swiglu_limit": 7.0}, "experts with a limit of their activation"),
        ({"apply_router_weight_on_input": True}, "router weights applied to the input of experts"),
        ({"dp_size": 2}, "experts in data, sequence or context parallelism"),
        (
            {"in_dtype": torch.float16, "device": "cuda"},
            r"experts in torch.float16 in CUDA graphs \(use --dtype bfloat16",
        ),
        ({"in_dtype": torch.float16, "device": "cuda", "max_capture_size": 0}, None),
        ({}, None),
    ],
)
def test_experts_that_compute_something_else(change: dict[str, Any], message: str | None) -> None:
    """vLLM's description of experts, all that matters here in one."""
    moe = {"has_bias": False, "activation": MoEActivation.SILU, "swiglu_limit": None, "in_dtype": torch.bfloat16,
           "max_capture_size": 512, "dp_size": 1, "pcp_size": 1, "is_sequence_parallel": False, "device": "cpu",
           "apply_router_weight_on_input": False, "layer_name": "model.layers.0.mlp.experts", **change}  # fmt: skip
    config = SimpleNamespace(**moe, moe_parallel_config=SimpleNamespace(**moe))
    layer = SimpleNamespace(**moe, moe_config=config)
    if message is None:
        refuse_unsupported(layer)
    else:
        with pytest.raises(UnsupportedError, match=f"model.layers.0.mlp.experts: {message}"):
            refuse_unsupported(layer)


def test_ranks_that_cut_scale_groups(stored: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """Where the ranks are processes of their own, what they raise is in their log."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with pytest.raises(Exception, match="initialization failed"), engine(stored, tensor_parallel_size=2):
        pass
    log = "".join(capfd.readouterr())
    assert "UnsupportedError: layer model.layers.0.self_attn.o_proj in 2 ranks of tensor parallelism: " in log
    assert "scale group 128 (block 128) a shard starts and ends at a multiple of 128 columns" in log
