"""Whole models on a CUDA device."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import higgs
import pytest
import torch
from conftest import DATA, make_checkpoint, torchrun
from higgs import _core, evaluate
from higgs.checkpoint.measure import MeasureOptions, measure_checkpoint
from higgs.cli.app import app
from higgs.integrations.attention import grouped_sdpa
from higgs.integrations.inductor import overlap_kernels
from higgs.linear import HiggsLinear
from higgs.sensitivity import Sensitivities
from torch import nn
from torch._inductor.utils import run_and_get_code
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from typer.testing import CliRunner

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (_core.with_cuda and torch.cuda.is_available()), reason="no CUDA device, or no kernels"),
]

IDS = torch.arange(40)[None] * 5 % 256


@pytest.fixture(params=[256, 576], ids=["block 256", "odd block"])
def model(request) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=request.param, intermediate_size=2 * request.param, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # logits that differ by more than rounding
    return model


def layers(model: nn.Module) -> dict[str, HiggsLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, HiggsLinear)}


def same_bytes(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name].cpu(), right[name].cpu()) for name in left)


def test_quantize_on_the_device_gives_the_bytes_of_the_cpu(model: LlamaForCausalLM) -> None:
    on_device = copy.deepcopy(model).cuda()
    energies = higgs.gather_energies(model, IDS)
    higgs.quantize_(model, bits=3, scales=energies)
    report = higgs.quantize_(on_device, bits=3, scales=energies)
    assert len(report.layers) == 14 and all(m.tiled is not None for m in layers(on_device).values())
    assert same_bytes(model, on_device)
    assert higgs.quantize_(LlamaForCausalLM(model.config).cuda(), bits=4).layers  # energies gathered on the device
    restored, expected = higgs.dequantize_(on_device).cpu(), model(IDS).logits
    assert (restored(IDS).logits - expected).norm() <= 1e-4 * expected.norm()


def test_generate_gives_the_tokens_of_the_cpu(model: LlamaForCausalLM) -> None:
    higgs.quantize_(model, bits=4, scales="none")
    expected = model(IDS).logits
    tokens = model.generate(IDS[:, :8], max_new_tokens=24, do_sample=False)
    on_cpu = copy.deepcopy(model)
    model.cuda()
    assert (model(IDS.cuda()).logits.cpu() - expected).norm() <= 1e-4 * expected.norm()
    assert torch.equal(model.generate(IDS[:, :8].cuda(), max_new_tokens=24, do_sample=False).cpu(), tokens)
    for dtype in (torch.float16, torch.bfloat16):
        tolerance = 2 * (on_cpu.to(dtype)(IDS).logits - expected).norm()
        logits = model.to(dtype)(IDS.cuda()).logits.cpu().float()
        assert (logits - expected).norm() <= tolerance
        one_by_one, cache = [], None
        for i in range(IDS.shape[1]):  # the decode kernel
            out = model(IDS[:, i : i + 1].cuda(), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            one_by_one.append(out.logits.cpu().float())
        assert (torch.cat(one_by_one, 1) - expected).norm() <= tolerance


def test_save_and_load(model: LlamaForCausalLM, tmp_path: Path) -> None:
    higgs.quantize_(model.cuda(), bits=4)
    model.save_pretrained(tmp_path / "quantized")
    on_cpu = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert same_bytes(on_cpu, model)
    assert same_bytes(on_cpu.cuda(), model)
    pytest.importorskip("accelerate")
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cuda")
    assert same_bytes(mapped, model) and all(m.tiled is not None for m in layers(mapped).values())
    assert torch.equal(mapped(IDS.cuda()).logits, model(IDS.cuda()).logits)


def test_offloaded_layers_run_on_the_device(model: LlamaForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    higgs.quantize_(model, bits=4)
    model.save_pretrained(tmp_path / "quantized")
    place = {"model.embed_tokens": 0, "lm_head": 0, "model.norm": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map={**place, "model.layers.1": "cpu"})
    expected = model(IDS).logits
    assert (mapped(IDS.cuda()).logits.cpu() - expected).norm() <= 1e-4 * expected.norm()


def test_adapter_training(model: LlamaForCausalLM) -> None:
    """What QLoRA does: the gradient passes through quantized layers to a trained one."""
    higgs.quantize_(model, bits=4, scales="none")
    model.cuda().requires_grad_(False)
    adapter = model.model.layers[0].input_layernorm
    adapter.weight.requires_grad_()
    model(IDS.cuda(), labels=IDS.cuda()).loss.backward()
    on_device = adapter.weight.grad.cpu()
    twin = copy.deepcopy(model).cpu()
    twin.zero_grad()
    twin(IDS, labels=IDS).loss.backward()
    expected = twin.model.layers[0].input_layernorm.weight.grad
    assert expected.norm() > 0 and (on_device - expected).norm() <= 1e-3 * expected.norm()


def test_shared_inputs(model: LlamaForCausalLM) -> None:
    """q/k/v and gate/up in one launch: the same logits and gradients, compiled or not."""
    higgs.quantize_(model, bits=4)
    model.cuda().requires_grad_(False)
    ids, embedding = IDS.cuda(), model.model.embed_tokens.weight.requires_grad_()

    def logits_and_gradient(forward) -> list[torch.Tensor]:
        embedding.grad = None
        output = forward(input_ids=ids, labels=ids)
        output.loss.backward()
        with torch.no_grad():
            return [output.logits.detach(), embedding.grad.clone(), forward(input_ids=ids[:, :1]).logits]

    assert len(higgs.share_inputs_(model)) == 4
    shared = logits_and_gradient(model)
    compiled = logits_and_gradient(torch.compile(model, fullgraph=True, dynamic=False))
    higgs.share_inputs_(model, False)
    # float32 itself is 1e-5 (logits) and 5e-4 (gradient) away from float64 in these models.
    for found in (logits_and_gradient(model), compiled):
        for a, b, tolerance in zip(found, shared, (1e-4, 2e-3, 1e-4), strict=True):
            assert (a - b).norm() <= tolerance * b.norm() > 0


def test_checkpoint_quantized_on_the_device(tmp_path: Path) -> None:
    from higgs.checkpoint import quantize_checkpoint

    source = make_checkpoint(tmp_path / "source")
    for device in ("cpu", "cuda"):
        quantize_checkpoint(source, tmp_path / device, bits=4, device=device)
    weights = [(tmp_path / device / "model.safetensors").read_bytes() for device in ("cpu", "cuda")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("method", "tolerance"), [("fisher", 2e-2), ("noise", 2e-3)])  # labels may differ
def test_sensitivities_measured_on_the_device(tmp_path: Path, method: str, tolerance: float) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.float32)
    options = MeasureOptions(method=method, text="random", tokens=2048, context=64, levels=(0.01, 0.04), lm_head=True)
    cpu, cuda = (measure_checkpoint(source, tmp_path / d, options, device=d).alphas for d in ("cpu", "cuda"))
    assert len(cuda) == 15 and cuda == pytest.approx(cpu, rel=tolerance)


def test_sensitivities_from_text_sampled_on_the_device(stories260k: Path, tmp_path: Path) -> None:
    options = MeasureOptions(tokens=1024, context=64, scales="self")
    cpu, cuda = (measure_checkpoint(stories260k, tmp_path / d, options, device=d).alphas for d in ("cpu", "cuda"))
    assert sum(cuda.values()) == pytest.approx(sum(cpu.values()), rel=0.3)  # other samples


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@pytest.mark.parametrize("method", ["fisher", "noise"])
def test_ranks_measure_on_devices_of_their_own(tmp_path: Path, method: str) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.float32)
    options = MeasureOptions(method=method, text="random", tokens=8192, context=64, levels=(0.01,))
    one = measure_checkpoint(source, tmp_path / "one.json", options, device="cuda")
    words = ["measure", source, "-o", tmp_path / "two.json", "--method", method, "--text", "random", "--tokens", 8192]
    code, _, err = torchrun("-m", "higgs.cli", *words, "--context", 64, "--levels", "0.01", "--device", "cuda")
    assert code == 0, err
    assert Sensitivities.load(tmp_path / "two.json").alphas == pytest.approx(one.alphas, rel=1e-5)


def test_commands(stories260k: Path, tmp_path: Path) -> None:
    text = DATA / "tinystories-sample.txt"
    words = ["quantize", str(stories260k), "-o", str(tmp_path / "q"), "--bits", "8", "--device", "cuda"]
    assert CliRunner().invoke(app, words).exit_code == 0
    on_device, on_cpu = (evaluate.evaluate(tmp_path / "q", text, 128, 2, device=d) for d in ("cuda", "cpu"))
    assert on_device["perplexity"] == pytest.approx(on_cpu["perplexity"], rel=1e-4)
    assert evaluate.generate(tmp_path / "q", "Once upon a time", 8, device="cuda").startswith("Once upon a time, there")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Rows looked up on the device are those of the CPU, also in a CUDA graph."""
    higgs.quantize_(model, bits=4, lm_head_grid="ch8", embedding_grid="p2_n1024", scales="none")
    embedding, ids = model.to(dtype).get_input_embeddings(), IDS[:, :16].expand(3, -1)
    expected = embedding(ids)
    model.cuda()
    assert torch.equal(embedding(ids.cuda()).cpu(), expected)
    static, graph = torch.zeros(3, 16, dtype=torch.long, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = embedding(static)
    static.copy_(ids)
    graph.replay()
    assert torch.equal(rows.cpu(), expected)


@pytest.mark.parametrize("keys", [96, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_of_one_token(dtype: torch.dtype, keys: int) -> None:
    """Against the formula in float64, at most twice as far from it as transformers' "sdpa" is."""
    torch.manual_seed(0)
    shapes = ((8, 1), (2, keys), (2, keys))
    query, key, value = (torch.randn(3, h, m, 64, device="cuda", dtype=dtype) for h, m in shapes)
    mask = torch.arange(keys, device="cuda") < torch.tensor([7, keys, 40], device="cuda")[:, None, None, None]
    k, v = (t.double().repeat_interleave(4, dim=1) for t in (key, value))
    scores = (query.double() @ k.mT / 8).masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    module = nn.Module()
    module.num_key_value_groups = 4
    errors = [
        (attention(module, query, key, value, mask)[0].double() - expected).norm()
        for attention in (grouped_sdpa, sdpa_attention_forward)
    ]
    assert errors[0] <= 2 * errors[1] and errors[1] < 0.02 * expected.norm()


@pytest.fixture
def overlap() -> Iterator[Callable[[bool], None]]:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("kernels start early from sm_90 on")

    def switch(enabled: bool) -> None:
        overlap_kernels(enabled)
        torch._dynamo.reset()

    yield switch
    switch(False)


def test_compiled_kernels_start_early(model: LlamaForCausalLM, overlap: Callable[[bool], None]) -> None:
    """The same bits as if they did not, of steps that differ from those before them, in one CUDA graph."""
    higgs.quantize_(model, bits=4, scales="none")
    model.to("cuda", torch.bfloat16)
    logits, codes = [], []
    for enabled in (False, True):
        overlap(enabled)
        step = torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead")
        with torch.inference_mode():
            _, sources = run_and_get_code(step, IDS[:, :1].cuda())
            logits.append([step(IDS[:, i % 7, None].cuda()).logits.clone() for i in range(70)])
        codes.append("".join(sources))
    assert all(map(torch.equal, *logits)) and not torch.equal(logits[0][0], logits[0][1])
    marks = ("gdc_launch_dependents()", "gdc_wait()", "'launch_pdl': True")
    assert not any(mark in codes[0] for mark in marks)
    kernels = codes[1].split("def triton_")[1:]
    assert kernels and all(codes[1].count(mark) == len(kernels) for mark in marks)
    assert all("gdc_wait()" in re.split(r"tl\.(?:load|store|atomic)", kernel)[0] for kernel in kernels)


def test_kernels_that_start_early_wait_for_all_before(overlap: Callable[[bool], None]) -> None:
    """Of three kernels the last reads what the first writes slowly, and the second, which is quick, neither."""

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        slow = x
        for _ in range(8):
            slow = slow.sin() + x
        return slow.sum(-1)[:, None] + y.amax() * y

    inputs = [(i + torch.rand(2**14, 1000, device="cuda"), i + torch.rand(99, device="cuda")) for i in range(5)]
    overlap(True)
    compiled = torch.compile(f, fullgraph=True, dynamic=False, mode="reduce-overhead")
    for i in range(50):
        torch.testing.assert_close(compiled(*inputs[i % 5]), f(*inputs[i % 5]), rtol=1e-4, atol=1e-3)
