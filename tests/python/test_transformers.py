"""Quantizing while loading, and every architecture that should work, in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import higgs
import pytest
import torch
import transformers
from conftest import load_whole as load
from conftest import save_random
from higgs import HiggsQuantConfig
from higgs.checkpoint import quantize_checkpoint
from higgs.evaluate import effective_bits
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(20)[None] * 5 % 256
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT: dict[str, Any] = {"ffn_dim": 192, "word_embed_proj_dim": 128, "do_layer_norm_before": True}
# name: model class, its sizes, Linear layers quantized and left alone in each of its two layers
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "llama": ("Llama", {}, 7, 0),
    "llama-narrow": ("Llama", {"intermediate_size": 172, "tie_word_embeddings": True}, 6, 1),
    "qwen2-biases": ("Qwen2", {}, 7, 0),
    "qwen3": ("Qwen3", {"head_dim": 64}, 7, 0),
    "gemma3-tied-odd": ("Gemma3", {"hidden_size": 192, "intermediate_size": 320, "head_dim": 48, "sliding_window": 16,
                                   "vocab_size": 263, "layer_types": ["sliding_attention", "full_attention"]}, 7, 0),
    "mistral": ("Mistral", {"sliding_window": 16}, 7, 0),
    "phi3-fused": ("Phi3", {}, 4, 0),
    "opt": ("OPT", OPT, 6, 0),
    "gpt2-conv1d": ("GPT2", {"n_inner": 192}, 4, 0),
    "mixtral": ("Mixtral", {"num_local_experts": 4}, 6, 0),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 16, "moe_intermediate_size": 64, "num_experts_per_tok": 4}, 6, 0),
}  # fmt: skip
# Continuous batching of transformers does not know their attention: it gives no tokens for the originals either.
NO_CONTINUOUS_BATCHING = ("opt", "gpt2-conv1d")


def make(family: str, path: Path) -> Path:
    """A random model, with biases and norms that are not the initial zeros and ones."""
    kind, sizes, _, _ = FAMILIES[family]
    config_class = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**SIZES, **sizes}))
    return save_random(model, path)


def tokens(model: PreTrainedModel, **kwargs: Any) -> list[int]:
    return model.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False, **kwargs)[0].tolist()


def assert_same(a: PreTrainedModel, b: PreTrainedModel) -> None:
    """The same tensors bit for bit, the same formats, the same logits."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    assert a.config.quantization_config.to_dict() == b.config.quantization_config.to_dict()
    assert torch.equal(a(IDS).logits, b(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures(family: str, tmp_path: Path) -> None:
    """Quantized in memory, quantized while loading, and saved and loaded: one model."""
    path = make(family, tmp_path / "original")
    original = load(path)
    biases = {name: p.clone() for name, p in original.named_parameters() if name.endswith("bias")}
    assert bool(biases) == (family in ("qwen2-biases", "opt", "gpt2-conv1d"))
    expected = original(IDS).logits
    report = higgs.quantize_(original, bits=6, scales="none")
    _, _, quantized, left = FAMILIES[family]
    assert (len(report.layers), len(report.skipped)) == (2 * quantized, 2 * left)
    assert sum(isinstance(m, higgs.HiggsLinear) for m in original.modules()) == 2 * quantized
    assert (original(IDS).logits - expected).norm() < 0.1 * expected.norm()

    model = load(path, quantization_config=HiggsQuantConfig(bits=6))
    assert_same(model, original)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], bias) for name, bias in biases.items())
    tied = load(path).config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied

    model.save_pretrained(tmp_path / "quantized")
    loaded = load(tmp_path / "quantized")
    assert_same(loaded, original)
    assert tokens(loaded) == tokens(model) == tokens(original)


def test_conv1d_becomes_conv1d_again(tmp_path: Path) -> None:
    """Its weight is [in, out]: square ones would not even be noticed."""
    path = make("gpt2-conv1d", tmp_path / "original")
    expected, original = load(path)(IDS).logits, load(path).state_dict()
    model = load(path, quantization_config=HiggsQuantConfig(bits=8, scales="random"))
    assert effective_bits(model) < 9
    model.save_pretrained(tmp_path / "quantized")
    model = load(tmp_path / "quantized").dequantize()
    model.save_pretrained(tmp_path / "dequantized")
    restored = load(tmp_path / "dequantized")
    assert (
        restored.state_dict().keys() == original.keys()
        and type(restored.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    )
    errors = {name: (t - original[name]).norm() / original[name].norm() for name, t in restored.state_dict().items()}
    assert max(errors.values()) < 0.01 and sum(error > 0 for error in errors.values()) == 8
    assert (restored(IDS).logits - expected).norm() < 0.02 * expected.norm()


def test_conv1d_is_streamed(tmp_path: Path) -> None:
    """Its [in, out] becomes rows of outputs; c_fc [128, 192] is the only one that could be told by its shape."""
    path = make("gpt2-conv1d", tmp_path / "original")
    model = load(path)
    energies = higgs.gather_energies(model, IDS.expand(4, -1))
    report = quantize_checkpoint(path, tmp_path / "streamed", bits=4, energies=energies)
    assert {(r.layer.rpartition(".")[2], r.n, r.k) for r in report.layers} == {
        ("c_attn", 384, 128), ("c_proj", 128, 128), ("c_fc", 192, 128), ("c_proj", 128, 192)
    }  # fmt: skip
    assert not report.notes and not report.skipped
    higgs.quantize_(model, bits=4, scales=energies)
    assert_same(load(tmp_path / "streamed"), model)


@pytest.mark.parametrize(
    "options",
    [
        {"grid": "p1_n256", "seed": 3, "skip": ["down_proj"], "block": 64},
        {"bits": 3, "scales": "random"},
        {"allocation": {"lm_head": "p2_n64", "model.layers.1.mlp.up_proj": "p2_n256"}},
        {"bits": 4, "lm_head_grid": "ch8"},
    ],
)
@pytest.mark.parametrize("family", ["llama-narrow", "qwen2-biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_option_while_loading(family: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    path = make(family, tmp_path / "original")
    expected = load(path, dtype=dtype)
    higgs.quantize_(expected, **{"scales": "none", **options})
    model = load(path, dtype=dtype, quantization_config=HiggsQuantConfig(**options))
    assert_same(model, expected)
    head = options.get("lm_head_grid", options.get("allocation", {}).get("lm_head"))
    assert isinstance(model.lm_head, higgs.HiggsLinear) == (head is not None)
    assert head is None or model.lm_head.format.grid == head
    assert model.model.embed_tokens.weight.dtype == dtype
    model.save_pretrained(tmp_path / "quantized", max_shard_size="40KB")
    assert_same(load(tmp_path / "quantized", dtype=dtype), expected)
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert config.keys() == {"quant_method", "format_version", "layers"}


def test_options_as_a_dict_and_layers_left_alone_are_told(tmp_path: Path, monkeypatch) -> None:
    from higgs.integrations.transformers import logger

    told: list[str] = []
    monkeypatch.setattr(logger, "warning", told.append)
    config = HiggsQuantConfig(bits=4, skip=["q_proj"]).to_dict()
    model = load(make("llama-narrow", tmp_path), quantization_config=config)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert told == [
        f"layer model.layers.{i}.mlp.down_proj is not quantized: in_features = 172 is not a multiple of 64"
        for i in range(2)
    ]
    with pytest.raises(higgs.UnsupportedError, match=r"layers.0.mlp.down_proj cannot be quantized: in_features = 172"):
        load(tmp_path, quantization_config=HiggsQuantConfig(bits=4, strict=True))


def test_weights_are_quantized_one_by_one(tmp_path: Path, monkeypatch) -> None:
    """No second unquantized weight is in memory when one is quantized."""
    from higgs.integrations import transformers as integration

    path, unquantized = make("llama", tmp_path), []

    def quantize(weight: torch.Tensor, fmt: higgs.LayerFormat) -> tuple[torch.Tensor, torch.Tensor, float]:
        linears = [m for m in models[0].modules() if type(m) is nn.Linear and m is not models[0].lm_head]
        unquantized.append(sum(not m.weight.is_meta for m in linears))
        return higgs._ops.quantize(weight, fmt)

    models: list[nn.Module] = []
    plan = integration.plan_formats
    monkeypatch.setattr(integration, "plan_formats", lambda model, **kw: (models.append(model), plan(model, **kw))[1])
    monkeypatch.setattr(integration, "quantize", quantize)
    load(path, quantization_config=HiggsQuantConfig(bits=4))
    assert unquantized == [0] * 14


def test_automatic_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    path = make("llama", tmp_path / "original")
    expected = load(path, quantization_config=HiggsQuantConfig(bits=4))
    expected.save_pretrained(tmp_path / "quantized", max_shard_size="40KB")
    for source, options in ((path, {"quantization_config": HiggsQuantConfig(bits=4)}), (tmp_path / "quantized", {})):
        model = AutoModelForCausalLM.from_pretrained(source, device_map="auto", **options)
        assert_same(model.to("cpu") if model.device.type != "cpu" else model, expected)


def test_layers_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    path = make("qwen2-biases", tmp_path / "original")
    expected = load(path, quantization_config=HiggsQuantConfig(bits=4))
    place = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=HiggsQuantConfig(bits=4), device_map={**place, "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )  # fmt: skip
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_bad_arguments(tmp_path: Path) -> None:
    path = make("llama", tmp_path)
    with pytest.raises(ValueError, match="exactly one of bits, grid and allocation"):
        load(path, quantization_config=HiggsQuantConfig())
    with pytest.raises(ValueError, match="exactly one of bits, grid and allocation"):
        HiggsQuantConfig(bits=4, grid="p2_n256")
    with pytest.raises(TypeError, match="does not take bit, sead"):
        HiggsQuantConfig(bit=4, sead=3)
    with pytest.raises(TypeError, match="skip is 'q_proj'; use a list"):
        HiggsQuantConfig(bits=4, skip="q_proj")
    with pytest.raises(higgs.FormatError, match="layers of the quantization_config is 4, expected an entry for each"):
        HiggsQuantConfig(4)
    with pytest.raises(ValueError, match="p9"):
        HiggsQuantConfig(grid="p9")
    with pytest.raises(ValueError, match="p9"):
        HiggsQuantConfig(allocation={"lm_head": "p9"})
    with pytest.raises(ValueError, match="p9"):
        HiggsQuantConfig(bits=4, lm_head_grid="p9")
    with pytest.raises(ValueError, match="lm_head_grid and allocation: name the head in the allocation"):
        HiggsQuantConfig(allocation={"lm_head": "p2_n64"}, lm_head_grid="ch8")
    with pytest.raises(ValueError, match="7"):
        HiggsQuantConfig(bits=7)
    with pytest.raises(ValueError, match="scales 'text' is not supported; use 'none', 'self' or 'random'"):
        HiggsQuantConfig(bits=4, scales="text")
    with pytest.raises(ValueError, match="'model.layers.9.x', which is no Linear layer"):
        load(path, quantization_config=HiggsQuantConfig(allocation={"model.layers.9.x": "p2_n64"}))
    with pytest.raises(ValueError, match="block"):
        load(path, quantization_config=HiggsQuantConfig(bits=4, block=100))


def test_tensor_parallelism_is_refused(tmp_path: Path) -> None:
    model = load(make("llama", tmp_path))
    model.config.distributed_config = transformers.distributed.DistributedConfig()
    quantizer = higgs.integrations.transformers.HiggsHfQuantizer(HiggsQuantConfig(bits=4), pre_quantized=False)
    with pytest.raises(higgs.UnsupportedError, match="distributed_config or tp_plan: save the quantized model"):
        quantizer.preprocess_model(model)


def test_bad_weights_name_the_layer(tmp_path: Path) -> None:
    model = load(make("llama", tmp_path))
    model.model.layers[1].mlp.up_proj.weight.data[3, 7] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer model.layers.1.mlp.up_proj: weight \[3, 7\] is inf"):
        load(tmp_path, quantization_config=HiggsQuantConfig(bits=4))


@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache_and_compilation_give_the_same_tokens(family: str, tmp_path: Path) -> None:
    torch._dynamo.reset()  # code that models share may be compiled but a few times
    model = load(make(family, tmp_path), quantization_config=HiggsQuantConfig(bits=4))
    assert model.hf_quantizer.is_compileable
    expected = tokens(model)
    assert tokens(model, cache_implementation="static") == expected and not hasattr(model, "_compiled_call")
    compilation = CompileConfig(fullgraph=True, mode="default", backend="aot_eager")
    compilation._compile_all_devices = True
    assert tokens(model, cache_implementation="static", compile_config=compilation) == expected
    assert hasattr(model, "_compiled_call")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NO_CONTINUOUS_BATCHING])
def test_continuous_batching_gives_the_same_tokens(family: str, tmp_path: Path) -> None:
    """Paged attention, prompts of different lengths in one batch."""
    model = load(make(family, tmp_path), quantization_config=HiggsQuantConfig(bits=4))
    prompts = [[5, 7, 9], IDS[0, 1:].tolist(), [100]]  # without the padding token
    options = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=2)
    expected = [model.generate(torch.tensor([p]), generation_config=options)[0, len(p) :].tolist() for p in prompts]
    memory = ContinuousBatchingConfig(block_size=16, num_blocks=16, max_batch_tokens=64)  # default: all there is
    found = model.generate_batch(prompts, generation_config=options, continuous_batching_config=memory)
    assert [output.generated_tokens for output in found.values()] == expected
