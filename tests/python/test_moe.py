"""Experts of a mixture: the operator, the module, and models of transformers that have them."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import higgs
import pytest
import torch
import transformers
from conftest import load_whole as load
from conftest import save_random
from higgs import HiggsQuantConfig, _grouped
from higgs.checkpoint import inspect_checkpoint, quantize_checkpoint
from higgs.checkpoint.measure import MeasureOptions, measure_checkpoint
from higgs.moe import HiggsExperts, HiggsGrouped
from safetensors.torch import load_file, save_file
from torch import nn

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

ONE_OF_TWO = r"experts.gate_up is to be quantized, .*experts.down is not: take both or none"


def make(family: str, path: Path, **sizes: Any) -> Path:
    kind, own = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **sizes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return save_random(model, path)


def experts_of(model: nn.Module) -> dict[str, HiggsExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, HiggsExperts)}


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).int()


# ---- the operator


def packed(experts: int = 4, n: int = 48, k: int = 192, grid: str = "p2_n64") -> tuple[HiggsGrouped, torch.Tensor]:
    """A module with column scales and its weights W^ [experts, n, k]."""
    fmt = higgs.layer_format(experts * n, k, grid, seed=3)
    module, t2 = HiggsGrouped.from_weight(torch.randn(experts, n, k), fmt, (0.5 + torch.rand(k)).half())
    assert t2 == pytest.approx(higgs.find_grid(grid).t2, rel=0.1)
    return module, module.dequantize()


def products(x: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return torch.cat([part @ w.T for part, w in zip(x.split(counts), weights, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 7], [1, 0, 0, 0], [0, 0, 0, 0], [40, 3, 0, 2]])
@pytest.mark.parametrize("grid", ["p2_n64", "p4_n4096"])
def test_rows_meet_their_expert(grid: str, counts: list[int], dtype: torch.dtype) -> None:
    module, weights = packed(grid=grid)
    x = torch.randn(sum(counts), 192).to(dtype)
    y = module(x, offsets_of(counts))
    assert y.dtype == dtype and y.shape == (sum(counts), 48)
    exact = products(x.double(), weights.double(), counts)
    assert (y - exact).norm() <= 2 * (products(x, weights.to(dtype), counts) - exact).norm() + 1e-6
    single = HiggsGrouped(module.format.with_rows(48), 1)
    for expert, (rows, expected) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
        part = slice(expert * 48, (expert + 1) * 48)
        single.indices, single.scales, single.column_scale = (
            nn.Parameter(t, requires_grad=False)
            for t in (module.indices[part], module.scales[part], module.column_scale)
        )
        assert torch.equal(single(rows, offsets_of([len(rows)])), expected)  # bit for bit, in any batch


def test_gradient_and_operator_checks() -> None:
    module, weights = packed()
    counts = [2, 0, 5, 3]
    x = torch.randn(10, 192, requires_grad=True)
    upstream = torch.randn(10, 48)
    (grad,) = torch.autograd.grad(module(x, offsets_of(counts)), x, upstream)
    assert torch.allclose(grad, products(upstream, weights.transpose(1, 2), counts), atol=1e-4)
    f = module.format
    stored = (module.indices, module.scales, module.column_scale, f.grid, f.block, f.group, f.seed)
    torch.library.opcheck(_grouped.grouped_linear, (x, offsets_of(counts), *stored))
    torch.library.opcheck(torch.ops.higgs.grouped_linear_grad, (upstream, offsets_of(counts), *stored))


def test_bad_arguments() -> None:
    module, _ = packed()
    x = torch.randn(5, 192)
    with pytest.raises(ValueError, match=r"offsets\[2\] is 1, less than the 3 before it"):
        module(x, torch.tensor([0, 3, 1, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match="the last offset is 4, x has 5 rows"):
        module(x, offsets_of([4, 0, 0, 0]))
    with pytest.raises(ValueError, match="5 experts cannot share 192 rows"):
        module(x, offsets_of([5, 0, 0, 0, 0]))
    with pytest.raises(TypeError, match="offsets is torch.int64; use torch.int32"):
        module(x, offsets_of([5, 0, 0, 0]).long())
    with pytest.raises(ValueError, match="x has 191 features, the layer has in_features = 192"):
        module(x[:, 1:], offsets_of([5, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"x has shape \[1, 5, 192\]"):
        module(x[None], offsets_of([5, 0, 0, 0]))
    with pytest.raises(ValueError, match="3 experts cannot share 64 rows"):
        HiggsGrouped(higgs.layer_format(64, 64, "p2_n64"), 3)


# ---- the module


def experts_pair(experts: int = 4) -> tuple[HiggsExperts, nn.Module]:
    """A quantized module, and that of transformers with the same weights W^."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=experts, experts_implementation="eager")
    original = transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)
    nn.init.normal_(original.gate_up_proj, std=0.1)
    nn.init.normal_(original.down_proj, std=0.1)
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": original})})
    higgs.quantize_(model, bits=4, scales="none")
    module = model["mlp"]["experts"]
    assert isinstance(module, HiggsExperts)
    return module, module.to_experts()


@pytest.mark.parametrize(
    "chosen",
    [
        [[0, 1], [2, 3], [1, 0], [3, 1], [0, 2]],
        [[2, 1]] * 5,  # two experts get everything, the others nothing
        [[3, 0]],
    ],
)
def test_experts_are_those_of_transformers(chosen: list[list[int]]) -> None:
    module, reference = experts_pair()
    x = torch.randn(len(chosen), 128, requires_grad=True)
    index, weights = torch.tensor(chosen), torch.rand(len(chosen), 2)
    y, expected = module(x, index, weights), reference(x, index, weights)
    assert torch.allclose(y, expected, atol=1e-5)
    upstream = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, x, upstream)[0] for out in (y, expected))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_ties_of_the_router_and_no_tokens() -> None:
    module, reference = experts_pair()
    index = torch.full((6, 4), 0.25).topk(2).indices  # all experts are equally good
    x, weights = torch.randn(6, 128), torch.full((6, 2), 0.5)
    assert torch.allclose(module(x, index, weights), reference(x, index, weights), atol=1e-5)
    assert module(x[:0], index[:0], weights[:0]).shape == (0, 128)
    assert torch.equal(module(x[4:], index[4:], weights[4:]), module(x, index, weights)[4:])


def test_copies_and_dtypes() -> None:
    module, _ = experts_pair()
    arguments = torch.randn(3, 128), torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.rand(3, 2)
    expected = module(*arguments)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(*arguments), expected)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half.gate_up.scales.dtype == torch.float16
    y = half(arguments[0].bfloat16(), *arguments[1:])
    assert y.dtype == torch.bfloat16 and (y - expected).norm() <= 2e-2 * expected.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (module(*arguments) - expected).norm() <= 2e-2 * expected.norm()


# ---- models


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures(family: str, tmp_path: Path) -> None:
    """Quantized in memory, quantized while loading, and saved and loaded: one model, near to the dequantized one."""
    path = make(family, tmp_path / "original")
    original = load(path)
    expected = original(IDS).logits
    report = higgs.quantize_(original, bits=6, scales="none")
    names = [r.layer for r in report.layers if "experts" in r.layer]
    assert names[:2] == ["model.layers.0.mlp.experts.gate_up", "model.layers.0.mlp.experts.down"]
    assert len(names) == (2 if family == "qwen2_moe" else 4) and len(experts_of(original)) == len(names) // 2
    router = original.model.layers[0].mlp.gate
    assert not any("mlp.gate." in r.layer or r.layer.endswith("mlp.gate") for r in report.layers)
    assert router.weight.dtype == torch.float32
    logits = original(IDS).logits
    assert (logits - expected).norm() < 0.1 * expected.norm()

    model = load(path, quantization_config=HiggsQuantConfig(bits=6))
    assert torch.equal(model(IDS).logits, logits)
    model.save_pretrained(tmp_path / "quantized", max_shard_size="100KB")
    loaded = load(tmp_path / "quantized")
    assert torch.equal(loaded(IDS).logits, logits)
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert loaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    text = [m.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False).tolist() for m in (model, loaded)]
    assert text[0] == text[1]
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "quantized" / "config.json").read_text()
    assert torch.equal(load(tmp_path / "again")(IDS).logits, logits)

    reference = higgs.dequantize_(copy.deepcopy(loaded))
    assert not experts_of(reference) and not hasattr(reference.config, "quantization_config")
    assert (reference(IDS).logits - logits).norm() <= 1e-5 * logits.norm()
    reference.save_pretrained(tmp_path / "dequantized")
    assert torch.equal(load(tmp_path / "dequantized")(IDS).logits, reference(IDS).logits)


def test_column_scales(tmp_path: Path) -> None:
    """Energies of experts: of what each projection reads, and better than none where the input has outliers."""
    path = make("mixtral", tmp_path / "original")
    model = load(path)
    model.model.layers[0].post_attention_layernorm.weight.data[5] = 8.0
    model.save_pretrained(path)
    expected = model(IDS).logits
    energies = higgs.gather_energies(model, IDS.expand(4, -1))
    name = "model.layers.0.mlp.experts"
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(IDS)
    hook.remove()
    assert torch.allclose(energies.energies[f"{name}.gate_up"], seen[0][1:].square().mean(0), rtol=1e-4)
    assert energies.energies[f"{name}.down"].shape == (192,)
    assert energies.energies[f"{name}.gate_up"].argmax() == 5
    plain, scaled = load(path), load(path)
    higgs.quantize_(plain, bits=3, scales="none")
    report = higgs.quantize_(scaled, bits=3, scales=energies)
    assert all(r.column_scale for r in report.layers)
    error, scaled_error = ((m(IDS).logits - expected).norm() for m in (plain, scaled))
    assert scaled_error < error
    scaled.save_pretrained(tmp_path / "quantized")
    assert torch.equal(load(tmp_path / "quantized")(IDS).logits, scaled(IDS).logits)


def test_allocation_and_skip(tmp_path: Path) -> None:
    path, name = make("qwen3_moe", tmp_path / "original"), "model.layers.1.mlp.experts"
    allocation = {f"{name}.gate_up": "p2_n64", f"{name}.down": "p2_n256", "lm_head": "p1_n256"}
    model = load(path, quantization_config=HiggsQuantConfig(allocation=allocation))
    experts = experts_of(model)
    assert experts.keys() == {name}
    assert (experts[name].gate_up.format.grid, experts[name].down.format.grid) == ("p2_n64", "p2_n256")
    model.save_pretrained(tmp_path / "quantized")
    loaded = load(tmp_path / "quantized")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert experts_of(load(path, quantization_config=HiggsQuantConfig(bits=4, skip=["experts"]))) == {}
    with pytest.raises(ValueError, match=ONE_OF_TWO):
        higgs.quantize_(load(path), allocation={f"{name}.gate_up": "p2_n64"}, scales="none")


def test_experts_that_cannot_be_quantized(tmp_path: Path) -> None:
    path = make("qwen3_moe", tmp_path / "original", moe_intermediate_size=96)
    report = higgs.quantize_(load(path), bits=4, scales="none")
    name = "model.layers.0.mlp.experts"
    assert report.skipped[f"{name}.down"] == "in_features = 96 is not a multiple of 64"
    assert report.skipped[f"{name}.gate_up"] == f"{name}.down cannot be quantized"
    model = load(path, quantization_config=HiggsQuantConfig(bits=4))
    assert experts_of(model) == {} and len(report.layers) == 8
    with pytest.raises(higgs.UnsupportedError, match="experts.down cannot be quantized: in_features = 96"):
        higgs.quantize_(load(path), bits=4, scales="none", strict=True)


def test_experts_of_other_kinds_stay_and_are_reported() -> None:
    config = transformers.GptOssConfig(**SIZES, head_dim=32, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.GptOssForCausalLM(config)
    report = higgs.quantize_(model, bits=4, scales="none")
    assert len(report.layers) == 8 and experts_of(model) == {}
    reason = "experts with biases, transposed weights or no gate are not supported"
    assert report.skipped == {f"model.layers.{i}.mlp.experts": reason for i in range(2)}
    with pytest.raises(higgs.UnsupportedError, match=f"layer model.layers.0.mlp.experts cannot be quantized: {reason}"):
        higgs.quantize_(transformers.GptOssForCausalLM(config), bits=4, scales="none", strict=True)


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_bad_weights_name_the_layer(parameter: str, tmp_path: Path) -> None:
    model = load(make("mixtral", tmp_path))
    getattr(model.model.layers[1].mlp.experts, parameter).data[2, 3, 7] = float("inf")
    model.save_pretrained(tmp_path)
    layer = f"model.layers.1.mlp.experts.{parameter.removesuffix('_proj')}"
    with pytest.raises(ValueError, match=rf"layer {layer}: weight \[\d+, 7\] is inf"):
        load(tmp_path, quantization_config=HiggsQuantConfig(bits=4))


def test_contradictions_in_a_checkpoint(tmp_path: Path) -> None:
    load(make("mixtral", tmp_path / "o"), quantization_config=HiggsQuantConfig(bits=4)).save_pretrained(tmp_path / "q")
    file = tmp_path / "q" / "config.json"
    good = json.loads(file.read_text())
    name = "model.layers.0.block_sparse_moe.experts"
    assert good["quantization_config"]["layers"][f"{name}.down"]["experts"] == 4
    assert "experts" not in good["quantization_config"]["layers"]["model.layers.0.self_attn.q_proj"]
    for key, value, message in (
        ("experts", 3, "experts.down says 3 experts, there are 4"),
        ("experts", 0, "experts is 0, expected a positive integer"),
        ("grid", "p2_n64", r"experts.down.indices has shape \[512, 96\], its quantization_config says \[512, 72\]"),
    ):
        bad = copy.deepcopy(good)
        bad["quantization_config"]["layers"][f"{name}.down"][key] = value
        file.write_text(json.dumps(bad))
        with pytest.raises(higgs.FormatError, match=message):
            load(tmp_path / "q")
    for layer, message in (
        (f"{name}.down", "is a MixtralExperts, expected experts with both of gate_up and down"),
        ("model.layers.0.self_attn.q_proj", "names the experts model.layers.7.experts, which the model does not have"),
    ):
        bad = copy.deepcopy(good)
        layers = bad["quantization_config"]["layers"]
        layers["model.layers.7.experts.down"] = {**layers.pop(layer), "experts": 4}
        file.write_text(json.dumps(bad))
        with pytest.raises(higgs.FormatError, match=message):
            load(tmp_path / "q")
    file.write_text(json.dumps(good))
    info = inspect_checkpoint(tmp_path / "q")
    assert {layer.layer: (layer.n, layer.k) for layer in info.layers if layer.layer.startswith(name)} == {
        f"{name}.down": (512, 192), f"{name}.gate_up": (1536, 128)
    }  # fmt: skip


# ---- checkpoints on disk


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("merged", [False, True], ids=["tensors of single experts", "merged tensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_gives_the_same_bytes(family: str, merged: bool, tmp_path: Path) -> None:
    model = load(make(family, tmp_path / "o"))
    path = tmp_path / "original"  # experts of one layer in several files
    model.save_pretrained(path, max_shard_size="200KB", save_original_format=not merged)
    names = tensors_of(path).keys()
    assert any(".experts.1." in name for name in names) != merged
    report = quantize_checkpoint(path, tmp_path / "streamed", bits=4)
    expected = higgs.quantize_(model, bits=4, scales="none")
    assert sorted(r.t2 for r in report.layers) == pytest.approx(sorted(r.t2 for r in expected.layers), rel=1e-5)
    assert sorted(r.bytes for r in report.layers) == sorted(r.bytes for r in expected.layers)
    streamed = load(tmp_path / "streamed")
    first, second = streamed.state_dict(), model.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(streamed(IDS).logits, model(IDS).logits)
    info = inspect_checkpoint(tmp_path / "streamed")
    assert len(info.layers) == len(report.layers) and not info.notes
    assert not any(".experts.1." in name or name.endswith("_proj") for name in tensors_of(tmp_path / "streamed"))


def test_streaming_with_column_scales_and_allocation(tmp_path: Path) -> None:
    path = make("mixtral", tmp_path / "original")
    model = load(path)
    energies = higgs.gather_energies(model, IDS.expand(4, -1))
    quantize_checkpoint(path, tmp_path / "scaled", bits=3, energies=energies)
    report = higgs.quantize_(model, bits=3, scales=energies)
    assert all(r.column_scale for r in report.layers)
    assert torch.equal(load(tmp_path / "scaled")(IDS).logits, model(IDS).logits)

    name = "model.layers.0.mlp.experts"
    grids = {f"{name}.gate_up": "p2_n64", f"{name}.down": "p2_n256"}
    found: Any = SimpleNamespace(grids=grids, notes=[], predicted_loss=0.0, gap=0.0)
    quantize_checkpoint(path, tmp_path / "allocated", allocation=lambda _: found, allocated="--bits 3.5")
    experts = experts_of(load(tmp_path / "allocated"))
    assert {n: (m.gate_up.format.grid, m.down.format.grid) for n, m in experts.items()} == {name: ("p2_n64", "p2_n256")}
    del grids[f"{name}.down"]
    with pytest.raises(ValueError, match=ONE_OF_TWO):
        quantize_checkpoint(path, tmp_path / "half", allocation=lambda _: found, allocated="--bits 3.5")


def test_streaming_names_a_bad_tensor(tmp_path: Path) -> None:
    path = make("mixtral", tmp_path / "original")
    tensors, name = tensors_of(path), "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name][4, 9] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"tensor {name}: weight \[4, 9\] is nan"):
        quantize_checkpoint(path, tmp_path / "out", bits=4)


def test_sensitivities_and_mixed_grids(tmp_path: Path) -> None:
    path = make("mixtral", tmp_path / "original")
    model = load(path)
    for name, parameter in model.named_parameters():
        if "experts" in name:  # as large as in real models, next to attention
            parameter.data *= 5
    model.save_pretrained(path)
    ratios = {}
    for method in ("fisher", "noise"):
        options = MeasureOptions(method=method, text="random", tokens=256, context=64, scales="none", levels=(0.01,))
        found = measure_checkpoint(path, tmp_path / f"{method}.json", options)
        layers = {layer.name: layer for layer in found.layers}
        assert len(layers) == 12
        for layer in range(2):
            gate_up, down = (layers[f"model.layers.{layer}.mlp.experts.{name}"] for name in ("gate_up", "down"))
            assert (gate_up.n, gate_up.k, down.n, down.k) == (1536, 128, 512, 192)
            # Of the last layer: noise in an earlier one changes which experts tokens get, which no gradient sees (but
            # the sum of the alphas, which noise in all layers gives).
            assert gate_up.alpha > 0
            ratios[method] = down.alpha / gate_up.alpha
    assert ratios["noise"] == pytest.approx(ratios["fisher"], rel=0.1)
    allocation = higgs.plan_allocation(found, bits=3.5)
    report = higgs.quantize_(load(path), allocation=allocation.grids, scales="none")
    assert len(report.layers) == 12 and report.bits <= 3.5
