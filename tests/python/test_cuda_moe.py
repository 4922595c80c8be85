"""Experts of a mixture on a CUDA device, against the CPU and a float64 oracle."""

from __future__ import annotations

import copy
from pathlib import Path

import higgs
import pytest
import torch
import transformers
from higgs import _core, _grouped
from higgs.moe import HiggsExperts, HiggsGrouped
from test_moe import IDS, make, offsets_of
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (_core.with_cuda and torch.cuda.is_available()), reason="no CUDA device, or no kernels"),
]

GRIDS = [g.name for g in higgs.grids() if g.family == "vector" or g.name == "a2_b6"]
# experts, n, k, block, group
SHAPES = [(5, 48, 64, 64, 64), (8, 80, 2240, 64, 640), (3, 256, 1024, 1024, 1024), (4, 32, 576, 576, 576),
          (40, 16, 1152, 384, 768), (2, 112, 7168, 512, 512)]  # fmt: skip
COUNTS = {  # rows of x of each expert, as many as there are experts
    "few": [1, 0, 3, 0, 2, 0, 0, 1],
    "chunks": [9, 0, 17, 8, 33, 1],
    "one expert": [0, 70],
    "many": [60, 90, 0, 130, 16, 200],
}


def counts_of(kind: str, experts: int) -> list[int]:
    return (COUNTS[kind] * experts)[:experts]


def grouped(experts: int, n: int, k: int, grid: str, **options) -> HiggsGrouped:
    fmt = higgs.layer_format(experts * n, k, grid, seed=3, **options)
    return HiggsGrouped.from_weight(torch.randn(experts, n, k), fmt, (0.5 + torch.rand(k)).half())[0]


def products(x: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return torch.cat([part @ w.T for part, w in zip(x.split(counts), weights, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
def test_as_exact_as_torch(grid: str, dtype: torch.dtype) -> None:
    ours = theirs = 0.0
    for experts, n, k, block, group in SHAPES:
        module = grouped(experts, n, k, grid, block=block, group=group).cuda()
        assert module.tiled is not None
        weights = module.dequantize().double()
        for kind in COUNTS:
            counts = counts_of(kind, experts)
            x = torch.randn(sum(counts), k, device="cuda").to(dtype)
            y = module(x, offsets_of(counts).cuda())
            exact = products(x.double(), weights, counts)
            assert y.dtype == dtype and y.shape == exact.shape
            reference = products(x, weights.to(dtype), counts)
            ours += (y - exact).square().sum().item()
            theirs += (reference - exact).square().sum().item()
    assert ours**0.5 <= 2 * theirs**0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    module = grouped(6, 96, 1536, "p2_n256").cuda()
    counts = [9, 0, 40, 1, 3, 100]
    x = torch.randn(sum(counts), 1536, device="cuda").to(dtype)
    y = module(x, offsets_of(counts).cuda())
    assert all(torch.equal(module(x, offsets_of(counts).cuda()), y) for _ in range(3))
    for expert, (rows, expected) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
        for i in range(min(len(rows), 3)):
            offsets = offsets_of([int(e == expert) for e in range(6)]).cuda()
            assert torch.equal(module(rows[i : i + 1], offsets), expected[i : i + 1])


def test_a_graph_serves_any_routing() -> None:
    module = grouped(8, 64, 512, "p2_n256").cuda()
    x = torch.randn(24, 512, device="cuda", dtype=torch.bfloat16)
    offsets = offsets_of([3] * 8).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        module(x, offsets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = module(x, offsets)
    for counts in ([0, 24, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 3, 0], [0, 0, 0, 0, 0, 0, 0, 24]):
        offsets.copy_(offsets_of(counts))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, module(x, offsets_of(counts).cuda()))


def test_weights_that_are_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    module = grouped(5, 80, 256, "p2_n256").cuda()
    counts = [3, 0, 9, 20, 1]
    x = torch.randn(sum(counts), 256, device="cuda", requires_grad=True)
    whole = module(x, offsets_of(counts).cuda())
    (grad,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr(_grouped, "_DECODED_BYTES", 5 * 256 * 48 * 4)
    assert torch.allclose(module(x, offsets_of(counts).cuda()), whole, atol=1e-4)
    again = module(x, offsets_of(counts).cuda())
    assert torch.allclose(torch.autograd.grad(again.square().sum(), x)[0], grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiled", [True, False])
def test_gradients_and_operator_checks(dtype: torch.dtype, tiled: bool) -> None:
    module = grouped(4, 48, 192, "p2_n64")
    weights, counts = module.dequantize(), [2, 0, 5, 3]
    module.cuda()
    if not tiled:
        module.untile_()
    x = torch.randn(10, 192).to(dtype)
    upstream = torch.randn(10, 48)
    ours = x.cuda().requires_grad_()
    (grad,) = torch.autograd.grad(module(ours, offsets_of(counts).cuda()), ours, upstream.cuda().to(dtype))
    expected = products(upstream, weights.transpose(1, 2), counts)
    assert (grad.cpu().float() - expected).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * expected.norm()
    f, offsets = module.format, offsets_of(counts).cuda()
    if tiled:
        packed = (module.tiled, module.input_vector, f.grid, f.n, f.group, f.block)
        torch.library.opcheck(_grouped.grouped_linear_tiled, (ours, offsets, *packed))
    else:
        packed = (module.indices, module.scales, module.column_scale, f.grid, f.block, f.group, f.seed)
        torch.library.opcheck(_grouped.grouped_linear, (ours, offsets, *packed))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_models(family: str, tmp_path: Path) -> None:
    path = make(family, tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(path)
    higgs.quantize_(model, bits=4, scales="none")
    expected, on_cpu = model(IDS).logits, copy.deepcopy(model)
    tokens = model.generate(IDS[:, :8], max_new_tokens=12, do_sample=False)
    model.cuda()
    assert all(m.gate_up.tiled is not None for m in model.modules() if isinstance(m, HiggsExperts))
    assert (model(IDS.cuda()).logits.cpu() - expected).norm() <= 1e-4 * expected.norm()
    assert torch.equal(model.generate(IDS[:, :8].cuda(), max_new_tokens=12, do_sample=False).cpu(), tokens)
    half = copy.deepcopy(model).to(torch.bfloat16)
    tolerance = 2 * (on_cpu.to(torch.bfloat16)(IDS).logits - expected).norm()
    assert (half(IDS.cuda()).logits.cpu() - expected).norm() <= tolerance
    model.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(loaded(IDS).logits, expected)
    on_device = AutoModelForCausalLM.from_pretrained(path).cuda()
    higgs.quantize_(on_device, bits=4, scales="none")
    a, b = on_device.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key].cpu(), b[key]) for key in a)
    if family == "mixtral":
        options = {"max_new_tokens": 12, "do_sample": False}
        compiled = transformers.CompileConfig(fullgraph=True, mode="reduce-overhead")
        static = half.generate(IDS[:, :8].cuda(), **options, cache_implementation="static", compile_config=compiled)
        assert torch.equal(static, half.generate(IDS[:, :8].cuda(), **options))
