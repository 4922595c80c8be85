"""quantize_, HiggsLinear, energies and the round trip through transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import higgs
import pytest
import torch
from higgs import baselines, energies, evaluate
from higgs.config import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def qwen() -> Qwen2ForCausalLM:
    """With biases, untied."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
    return model


IDS = torch.arange(40)[None] * 5 % 256


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_gives_the_same_bits(family: str, dtype: torch.dtype, request, tmp_path: Path) -> None:
    request.getfixturevalue(family).save_pretrained(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=dtype)
    report = higgs.quantize_(model, bits=4, scales="random")
    assert len(report.layers) == 14 and not report.skipped
    assert isinstance(model.lm_head, nn.Linear)
    logits = model(IDS).logits
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded(IDS).logits, logits)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "higgs_quant" and config["format_version"] == 1
    assert QuantizationConfig.from_dict(config).layers["model.layers.0.mlp.up_proj"].grid == "p2_n256"


def test_quantized_model_is_near_the_original_and_dequantizes(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    original = llama(IDS).logits
    higgs.quantize_(llama, grid="p1_n256", scales="random")
    quantized = llama(IDS).logits
    assert (quantized - original).norm() < 0.02 * original.norm()
    llama.save_pretrained(tmp_path / "quantized")  # after which transformers calls the dtype "float32"
    llama.dequantize()
    assert not any(isinstance(m, higgs.HiggsLinear) for m in llama.modules())
    assert torch.allclose(llama(IDS).logits, quantized, atol=1e-4)
    llama.save_pretrained(tmp_path)  # an ordinary model again
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_allocation_quantizes_what_it_names(qwen: Qwen2ForCausalLM) -> None:
    report = higgs.quantize_(
        qwen, allocation={"lm_head": "p1_n256", "model.layers.1.mlp.up_proj": "p2_n64"}, scales="none"
    )
    assert {r.layer: r.grid for r in report.layers} == {"lm_head": "p1_n256", "model.layers.1.mlp.up_proj": "p2_n64"}
    assert isinstance(qwen.lm_head, higgs.HiggsLinear) and qwen.lm_head.column_scale is None


def test_skip_strict_and_bad_arguments(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="exactly one of bits, grid and allocation"):
        higgs.quantize_(llama)
    with pytest.raises(ValueError, match="'model.layers.9.x', which is no Linear layer"):
        higgs.quantize_(llama, allocation={"model.layers.9.x": "p2_n64"})
    with pytest.raises(ValueError, match="scales 'text' is not supported"):
        higgs.quantize_(llama, bits=4, scales="text")
    with pytest.raises(TypeError, match="skip is 'down_proj'; use a list"):
        higgs.quantize_(llama, bits=4, skip="down_proj")
    with pytest.raises(ValueError, match=r"skip '\(' is no regular expression"):
        higgs.quantize_(llama, bits=4, skip=["("])
    with pytest.raises(TypeError, match="allocation is of <class 'list'>; use {layer name: grid name}"):
        higgs.quantize_(llama, allocation=["lm_head"])
    with pytest.raises(higgs.UnsupportedError, match="is a Linear layer itself"):
        higgs.quantize_(nn.Linear(64, 64), bits=4, scales="none")
    report = higgs.quantize_(llama, bits=3, skip=["down_proj", r"layers\.0\."])
    assert [r.layer.rpartition(".")[2] for r in report.layers] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    ]  # fmt: skip
    with pytest.raises(higgs.UnsupportedError, match="quantized already"):
        higgs.quantize_(llama, bits=3)


def test_narrow_layers_are_left_and_reported() -> None:
    model = AutoModelForCausalLM.from_pretrained(DATA / "stories260K")
    with pytest.raises(higgs.UnsupportedError, match=r"model.layers.0.mlp.down_proj .* in_features = 172"):
        higgs.quantize_(model, bits=4, strict=True)
    report = higgs.quantize_(model, bits=4)
    assert set(report.skipped) == {f"model.layers.{i}.mlp.down_proj" for i in range(5)}
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)


def test_nan_names_the_layer_and_changes_nothing(llama: LlamaForCausalLM) -> None:
    llama.model.layers[1].mlp.up_proj.weight.data[3, 7] = float("inf")
    with pytest.raises(ValueError, match=r"layer model.layers.1.mlp.up_proj: weight \[3, 7\] is inf"):
        higgs.quantize_(llama, bits=4, scales="none")
    assert not any(isinstance(m, higgs.HiggsLinear) for m in llama.modules())


def test_cast_keeps_the_format(llama: LlamaForCausalLM) -> None:
    higgs.quantize_(llama, bits=4, scales="random")
    llama.to(torch.bfloat16)
    layer = llama.model.layers[0].self_attn.q_proj
    assert layer.scales.dtype == layer.column_scale.dtype == torch.float16 and layer.indices.dtype == torch.uint8
    assert llama(IDS).logits.dtype == torch.bfloat16


def test_layers_offloaded_to_disk(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    higgs.quantize_(llama, bits=4, scales="random")
    llama.save_pretrained(tmp_path / "quantized")
    place = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized", device_map={**place, "model.layers.1": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(offloaded(IDS).logits, llama(IDS).logits)


def test_autocast_is_followed(llama: LlamaForCausalLM) -> None:
    higgs.quantize_(llama, bits=4, scales="none")
    layer = llama.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))
        assert higgs.linear_shared(x, [layer])[0].dtype == torch.bfloat16
    assert torch.equal(higgs.linear_shared(x, [layer, layer])[1], layer(x))


def _edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


def test_broken_checkpoints_are_refused(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    higgs.quantize_(llama, bits=4, scales="none")
    llama.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.indices"

    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(higgs.FormatError, match=rf"{name} has shape \[128, 63\], its .* says \[128, 64\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(higgs.FormatError, match=f"no tensor {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    broken = {**tensors, name.replace("indices", "scales"): tensors[name.replace("indices", "scales")] * torch.nan}
    save_file(broken, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(higgs.FormatError, match=r"q_proj.scales holds NaN"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    layers = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    removed = "model.layers.1.mlp.up_proj"
    for left, message in (({}, "lists no layers"), ({k: v for k, v in layers.items() if k != removed}, removed)):
        _edit_config(tmp_path, layers=left)
        with pytest.raises(higgs.FormatError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    _edit_config(tmp_path, layers={"model.layers.7.nothing": {"grid": "p2_n64", "block": 64, "group": 64, "seed": 0}})
    with pytest.raises(higgs.FormatError, match=r"names layer model.layers.7.nothing, which the model does not have"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    _edit_config(tmp_path, format_version=9)
    with pytest.raises(higgs.FormatError, match="format_version of the checkpoint is 9, this version of higgs reads 1"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


class TestEnergies:
    def test_shared_inputs_are_found(self, llama: LlamaForCausalLM) -> None:
        found = higgs.gather_energies(llama, energies.random_tokens(256, 64, 32))
        prefix = "model.layers.0."
        assert [f"{prefix}self_attn.{p}_proj" for p in "qkv"] in found.shared
        assert [f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"] in found.shared
        assert sorted(name for names in found.shared for name in names) == sorted(energies.linear_layers(llama))

    def test_energies_are_mean_squares(self, llama: LlamaForCausalLM) -> None:
        inputs = []
        layer = llama.model.layers[1].mlp.down_proj
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        ids = energies.random_tokens(256, 64, 32)
        found = higgs.gather_energies(llama, ids)
        handle.remove()
        expected = torch.cat(inputs)[:, 1:].square().mean((0, 1))
        assert torch.allclose(found.energies["model.layers.1.mlp.down_proj"], expected, rtol=1e-4)

    def test_quarter_power_minimises_the_expected_error(self) -> None:
        torch.manual_seed(0)
        a, b = torch.randn(64).exp(), torch.randn(64).exp()

        def error(s: torch.Tensor) -> float:
            return ((a / s**2).sum() * (b * s**2).sum()).item()

        best = error(energies.column_scale(a, b, 0.25).float())
        assert abs(best / (a * b).sqrt().sum().item() ** 2 - 1) < 1e-3  # the Cauchy-Schwarz bound
        assert best < error(energies.column_scale(a, b, 0.15).float()) < error(torch.ones(64))

    def test_blocks_get_equal_energy(self) -> None:
        torch.manual_seed(0)
        a, b = torch.rand(192), torch.cat([torch.rand(64), 50 * torch.rand(64), torch.rand(64)])
        s = energies.column_scale(a, b, 0.25, block=64).float()
        pooled = (b * s**2).view(3, 64).sum(1)
        assert pooled.max() / pooled.min() < 1.01

    def test_dead_columns_stay_finite(self) -> None:
        a, b = torch.tensor([0.0, 1.0, 1e30, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1e-30])
        s = energies.column_scale(a, b).float()
        assert torch.isfinite(s).all() and (s > 0).all()

    def test_save_and_load(self, llama: LlamaForCausalLM, tmp_path: Path) -> None:
        found = higgs.gather_energies(llama, energies.random_tokens(256, 64, 32))
        found.save(tmp_path / "e.safetensors")
        loaded = higgs.Energies.load(tmp_path / "e.safetensors")
        assert loaded.shared == found.shared and loaded.source == "random"
        assert all(torch.equal(loaded.energies[k], v) for k, v in found.energies.items())
        save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
        with pytest.raises(higgs.FormatError, match="expected 'higgs_energies' version '1'"):
            higgs.Energies.load(tmp_path / "other.safetensors")

    def test_scales_save_a_model_with_massive_channels(self, llama: LlamaForCausalLM) -> None:
        """What they are for: a few huge channels read by small weights."""
        for layer in llama.model.layers:
            for norm, readers in (
                (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                norm.weight.data[5] = 60.0
                for linear in readers:
                    linear.weight.data[:, 5] *= 0.02
        original = llama(IDS).logits
        state = {k: v.clone() for k, v in llama.state_dict().items()}

        def error(scales: str) -> float:
            model = LlamaForCausalLM(llama.config).eval()
            model.load_state_dict(state)
            higgs.quantize_(model, bits=4, scales=scales)
            return ((model(IDS).logits - original).norm() / original.norm()).item()

        assert error("random") < 0.6 * error("none")
        assert error("self") < 0.6 * error("none")

    def test_self_tokens_are_reproducible(self, llama: LlamaForCausalLM) -> None:
        first = energies.self_tokens(llama, 64, 16, seed=3)
        assert first.shape == (4, 16) and torch.equal(first, energies.self_tokens(llama, 64, 16, seed=3))
        assert not torch.equal(first, energies.self_tokens(llama, 64, 16, seed=4))

    def test_sampled_text_is_the_default(self, llama: LlamaForCausalLM) -> None:
        """higgs.quantize_(model, bits=3) == higgs.quantize_(model, bits=3, scales="self")."""
        scales = []
        for options in ({}, {"scales": "self"}, {"scales": "random"}):
            model = copy.deepcopy(llama)
            higgs.quantize_(model, bits=3, **options)
            scales.append(model.model.layers[0].mlp.down_proj.column_scale)
        assert torch.equal(scales[0], scales[1]) and not torch.equal(scales[0], scales[2])

    def test_text_is_sampled_without_a_cache_too(self, llama: LlamaForCausalLM) -> None:
        expected = energies.self_tokens(llama, 64, 16, seed=3)

        class Uncached(nn.Module):
            """Recurrent models have another kind of cache."""

            def __init__(self) -> None:
                super().__init__()
                self.model, self.config = llama, llama.config

            def forward(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
                return SimpleNamespace(logits=self.model(ids, use_cache=False).logits)

        assert torch.equal(energies.self_tokens(Uncached(), 64, 16, seed=3), expected)

    def test_a_model_of_nan_gives_tokens_and_nan(self, llama: LlamaForCausalLM) -> None:
        llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
        gathered = energies.own_energies(llama, "self", tokens=512)
        assert gathered.energies["model.layers.1.mlp.down_proj"].isnan().any()


class TestEvaluate:
    def test_perplexity_of_stories(self, tmp_path: Path) -> None:
        """The number of the model's own documentation: 5.8440 on its sample."""
        result = evaluate.evaluate(DATA / "stories260K", DATA / "tinystories-sample.txt", 512, 4, bos=True)
        assert result["bits"] == 32.0 and result["kl"] is None
        assert 5.0 < result["perplexity"] < 6.7
        full = evaluate.evaluate(DATA / "stories260K", DATA / "tinystories-sample.txt", 512, 30, bos=True)
        assert abs(full["perplexity"] - 5.8440) < 0.0006

    def test_kl_is_zero_against_itself(self, tmp_path: Path) -> None:
        result = evaluate.evaluate(
            DATA / "stories260K", DATA / "tinystories-sample.txt", 128, 2, base=DATA / "stories260K"
        )
        assert result["kl"] == 0.0

    def test_wikitext_rows_are_joined(self, tmp_path: Path) -> None:
        wiki, plain = tmp_path / "wiki.txt", tmp_path / "plain.txt"
        wiki.write_text(" \n = Title = \n \n First row \n Second row \n")
        assert evaluate.read_text(wiki) == "\n\n = Title = \n\n\n\n\n First row \n\n\n Second row \n"
        plain.write_text("First\nSecond\n")
        assert evaluate.read_text(plain) == "First\nSecond\n"

    def test_too_many_windows(self) -> None:
        with pytest.raises(ValueError, match="use 1 to "):
            evaluate.evaluate(DATA / "stories260K", DATA / "tinystories-sample.txt", 512, 4000)

    def test_generate(self) -> None:
        text = evaluate.generate(DATA / "stories260K", "Once upon a time", 12)
        assert text.startswith("Once upon a time, there was a little girl named Lily")


class TestBaselines:
    def test_round_to_nearest_keeps_lattice_weights(self) -> None:
        weight = torch.randint(0, 16, (4, 128)).float() - 5
        weight[:, ::64], weight[:, 1::64] = -5, 10  # the full range in every group
        assert torch.equal(baselines.round_to_nearest(weight, 4), weight)

    def test_nf4_error_on_gaussian_weights(self) -> None:
        weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
        t2 = ((baselines.nf4(weight) - weight).square().sum() / weight.square().sum()).item()
        assert 0.0080 < t2 < 0.0090  # 64 values are normalised by their own maximum
