"""The operators and HiggsLinear on a CUDA device, against the CPU and a float64 oracle."""

from __future__ import annotations

import copy
import io

import higgs
import pytest
import torch
from higgs import _core, _cuda, _ops
from higgs.linear import HiggsLinear
from torch import nn

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (_core.with_cuda and torch.cuda.is_available()), reason="no CUDA device, or no kernels"),
]

GRIDS = [g.name for g in higgs.grids()]
HALVES = [torch.float16, torch.bfloat16]
# n, k, block, group; the last two blocks have an odd factor, which the decode kernel does not rotate.
SHAPES = [(37, 64, 64, 64), (50, 2240, 64, 640), (33, 1024, 1024, 1024), (40, 576, 576, 576), (9, 1152, 384, 768)]


def packed(
    n: int, k: int, grid: str, block: int | None = None, group: int | None = None, *, column_scale: bool = True
) -> tuple[higgs.LayerFormat, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Random weights quantized on the CPU: (format, indices, scales, column_scale)."""
    fmt = higgs.layer_format(n, k, grid, block=block, group=group, seed=3)
    scale = (0.5 + torch.rand(k)).half() if column_scale else None
    indices, scales, _ = _ops.quantize(torch.randn(n, k), fmt, scale)
    return fmt, indices, scales, scale


def layer(n: int, k: int, grid: str = "p2_n256", *, bias: bool = True, seed: int = 3, **options) -> HiggsLinear:
    """A random layer, on the CPU."""
    linear = nn.Linear(k, n, bias=bias)
    if bias:
        nn.init.normal_(linear.bias)
    fmt = higgs.layer_format(n, k, grid, seed=seed, **options)
    return HiggsLinear.from_linear(linear, fmt, (0.5 + torch.rand(k)).half())[0].requires_grad_(False)


def arguments(fmt: higgs.LayerFormat) -> tuple[str, int, int, int]:
    return fmt.grid, fmt.block, fmt.group, fmt.seed


def moved(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_quantize_and_dequantize_give_the_bytes_of_the_cpu(grid: str, shape: tuple[int, ...]) -> None:
    n, k, block, group = shape
    fmt = higgs.layer_format(n, k, grid, block=block, group=group, seed=5)
    scale = (0.5 + torch.rand(k)).half()
    for dtype in (torch.float32, torch.bfloat16):
        weight = (0.02 * torch.randn(n, k)).to(dtype)
        indices, scales, t2 = _ops.quantize(weight, fmt, scale)
        on_device = _ops.quantize(weight.cuda(), fmt, scale)
        assert on_device[0].is_cuda and same_bits(on_device[0], indices) and same_bits(on_device[1], scales)
        assert on_device[2] == pytest.approx(t2, rel=1e-12)
    for dtype in (torch.float32, *HALVES):
        expected = _ops.dequantize(indices, scales, scale, *arguments(fmt), dtype)
        assert same_bits(_ops.dequantize(*moved(indices, scales, scale), *arguments(fmt), dtype), expected)
    tiled = _cuda.repack(*moved(indices, scales), fmt)
    assert all(same_bits(a, b) for a, b in zip(_cuda.unrepack(tiled, fmt), (indices, scales), strict=True))


def errors(module: HiggsLinear, dtype: torch.dtype, m: int) -> tuple[float, float]:
    """Error of the layer, and of torch in the same dtype on the dequantized weights, against float64."""
    x = torch.randn(m, module.in_features, device="cuda").to(dtype)
    weight = module.dequantize().double()
    bias = None if module.bias is None else module.bias.to(dtype)
    exact = nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    y = module(x)
    assert y.dtype == dtype and y.shape == exact.shape
    reference = nn.functional.linear(x, weight.to(dtype), bias)
    return (y - exact).norm().item(), (reference - exact).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("grid", GRIDS)
def test_linear_is_as_exact_as_torch(grid: str, dtype: torch.dtype) -> None:
    ours = theirs = 0.0
    for n, k, block, group in SHAPES:
        module = layer(n, k, grid, block=block, group=group).cuda()
        for m in (1, 3, 16, 17, 65):
            error, reference = errors(module, dtype, m)
            ours, theirs = ours + error**2, theirs + reference**2
    assert ours**0.5 <= 2 * theirs**0.5


# 9 to 16 rows of x meet large layers in a GEMM, trellises of regular layers (k is a multiple of 512) in products of
# integers.
@pytest.mark.parametrize("grid", ["p2_n256", "a2_b4", "a2_b5", "a2_b6", "a2_b7", "a2_b8"])
def test_large_layers(grid: str) -> None:
    n, k = 16500, 4608
    fmt = higgs.layer_format(n, k, grid, seed=3)
    module = HiggsLinear(fmt, device="cuda")
    module.indices.data.random_(256)
    module.scales.data = (0.5 + torch.rand(n, fmt.row_groups, device="cuda")).half()
    module.tile_()
    for dtype in HALVES:
        for m in (8, 9, 16, 1300):
            error, reference = errors(module, dtype, m)
            assert error <= 2 * reference


def test_weights_that_are_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(100, 1024).cuda()
    x = torch.randn(70, 1024, device="cuda", requires_grad=True)
    whole = module(x)
    (grad,) = torch.autograd.grad(whole.sum(), x)
    monkeypatch.setattr(_cuda, "_CHUNK_BYTES", 48 * 1024 * 4)
    assert torch.allclose(module(x), whole, atol=1e-4)
    assert torch.allclose(torch.autograd.grad(module(x).sum(), x)[0], grad, atol=1e-4)


def test_shapes_of_x() -> None:
    module = layer(48, 256).cuda()
    x = torch.randn(2, 3, 5, 256, device="cuda", dtype=torch.float16)
    y = module(x)
    assert y.shape == (2, 3, 5, 48)
    assert torch.allclose(module(x[1, 2, 4]), y[1, 2, 4], atol=2e-2)
    assert torch.equal(module(x.transpose(0, 2).contiguous().transpose(0, 2)), y)  # not contiguous
    for no_rows in (x[:, :0], x[:, :0].float()):
        assert module(no_rows).shape == (2, 0, 5, 48)
    assert layer(48, 192, block=192).cuda()(x[:0, ..., :192]).shape == (0, 3, 5, 48)
    shifted = torch.randn(2 * 256 + 1, device="cuda").half()[1:].view(2, 256)  # not aligned
    assert torch.equal(module(shifted), module(shifted.clone()))


@pytest.mark.parametrize("block", [256, 768], ids=["decode", "odd block"])
def test_same_input_same_bits(block: int) -> None:
    module = layer(300, 1536, block=block).cuda()
    for m in (1, 9, 40):
        x = torch.randn(m, 1536, device="cuda", dtype=torch.bfloat16)
        y = module(x)
        assert all(torch.equal(module(x), y) for _ in range(3))


def test_opcheck() -> None:
    fmt, indices, scales, scale = packed(32, 256, "p2_n256")
    other = layer(16, 256, "p2_n64", bias=False).cuda()
    stored = moved(indices, scales, scale)
    tiled, vector = _cuda.repack(*stored[:2], fmt), _cuda.input_vector(stored[2], fmt, stored[0].device)
    tensors = [tiled, other.tiled]
    rest = (["p2_n256", "p2_n64"], [32, 16], [fmt.group, other.format.group], fmt.block)
    for requires_grad in (False, True):
        for m in (3, 40):
            x = torch.randn(m, 256, device="cuda", requires_grad=requires_grad)
            bias = torch.randn(32, device="cuda", requires_grad=requires_grad)
            torch.library.opcheck(torch.ops.higgs.linear, (x, *stored, bias, *arguments(fmt)))
            torch.library.opcheck(torch.ops.higgs.linear_tiled, (x, tensors, vector, [bias], [True, False], *rest))
    grads = [torch.randn(5, 32, device="cuda"), torch.randn(5, 16, device="cuda")]
    torch.library.opcheck(torch.ops.higgs.linear_tiled_grad, (grads, tensors, vector, rest[0], rest[2], fmt.block))
    torch.library.opcheck(torch.ops.higgs.dequantize, (*stored, *arguments(fmt), torch.bfloat16))


def test_stored_layout_on_the_device() -> None:
    """Where parameters are put on the device by hand, as offloading does."""
    module = layer(48, 256)
    x = torch.randn(5, 256, device="cuda", dtype=torch.float16, requires_grad=True)
    expected = copy.deepcopy(module).cuda()(x)
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.cuda(), requires_grad=False))
    assert module.tiled is None and torch.equal(module(x), expected)
    y = module(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(grad, module.dequantize(torch.float16).sum(0), rtol=1e-2, atol=1e-2)
    assert module.tile_().tiled is not None and torch.equal(module(x), expected)


@pytest.mark.parametrize("m", [1, 40])
def test_gradients(m: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for block in (256, 192):
            module = layer(80, 768, block=block).cuda().requires_grad_(False)
            module.bias = nn.Parameter(module.bias.to(dtype))
            x = torch.randn(2, m, 768, device="cuda", dtype=dtype, requires_grad=True)
            grad = torch.randn(2, m, 80, device="cuda", dtype=dtype)
            module(x).backward(grad)
            expected = grad.double() @ module.dequantize().double()
            assert (x.grad - expected).norm() <= tolerance * expected.norm()
            assert torch.allclose(module.bias.grad, grad.sum((0, 1)), rtol=2e-2, atol=1e-2)


class Block(nn.Module):
    """Two layers that share x on different grids, and one of odd block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = layer(192, 256, "p2_n256"), layer(192, 256, "p2_n64", bias=False)
        self.gate.column_scale = nn.Parameter(self.up.column_scale.clone(), requires_grad=False)
        self.down = layer(256, 192, "p1_n16")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = higgs.linear_shared(x, [self.up, self.gate])
        return self.down(up * nn.functional.silu(gate))


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("grad", [False, True])
def test_compile_without_graph_breaks(m: int, grad: bool) -> None:
    torch.compiler.reset()
    block = Block().cuda()
    x = torch.randn(m, 256, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
    compiled = torch.compile(block, fullgraph=True)
    with torch.set_grad_enabled(grad):
        y, expected = compiled(x), block(x)
    assert (y - expected).norm() <= 0.02 * expected.norm()
    if grad:
        got, wanted = (torch.autograd.grad(out.float().sum(), x)[0] for out in (y, expected))
        assert (got - wanted).norm() <= 0.03 * wanted.norm()


@pytest.mark.parametrize("m", [1, 40])
def test_graph_capture_and_replay(m: int) -> None:
    block = Block().cuda()
    x = torch.randn(m, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            block(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, block(x))


def test_another_stream() -> None:
    module = layer(256, 4096).cuda()
    x = torch.randn(1, 4096, device="cuda", dtype=torch.float16)
    expected = module(x)
    stream = torch.cuda.Stream()
    late = torch.full_like(x, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        y = module(late)  # on the default stream it would read NaN
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_device_that_is_not_the_current_one() -> None:
    module, other = layer(64, 256).to("cuda:1"), layer(64, 256)
    x = torch.randn(3, 256, device="cuda:1", dtype=torch.float16)
    assert torch.allclose(module(x), x @ module.dequantize(torch.float16).T + module.bias.half(), atol=2e-2)
    assert same_bits(other.to("cuda:0").to("cuda:1").stored()[0], other.cpu().stored()[0])
    with pytest.raises(ValueError, match=r"x is on cuda:0, other tensors are on cuda:1"):
        module(x.to("cuda:0"))


def test_autocast_is_followed() -> None:
    module = layer(48, 256).cuda()
    x = torch.randn(3, 256, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(module(x), module(x.bfloat16()))
        assert higgs.linear_shared(x, [module])[0].dtype == torch.bfloat16


def test_shared_input_in_one_launch() -> None:
    """q, k, v with grids of three decoders and different n; the same as one by one."""
    column_scale = (0.5 + torch.rand(1024)).half()
    layers = []
    for n, grid, bias in ((256, "p2_n256", True), (64, "p2_n256", False), (80, "p4_n256", True), (72, "p2_n64", False)):
        fmt = higgs.layer_format(n, 1024, grid, seed=3)
        layers.append(HiggsLinear.from_linear(nn.Linear(1024, n, bias=bias).cuda(), fmt, column_scale)[0])
    for dtype in (torch.float32, *HALVES):
        for m in (1, 16, 40):
            x = torch.randn(m, 1024, device="cuda", dtype=dtype)
            for y, module in zip(higgs.linear_shared(x, layers), layers, strict=True):
                separate = module(x)
                assert y.dtype == dtype and (y - separate).norm() <= 1e-2 * separate.norm()
    x = torch.randn(3, 1024, device="cuda", requires_grad=True)
    sums = [y.sum() for y in higgs.linear_shared(x, layers)]
    (grad,) = torch.autograd.grad(sums[0] + sums[2], x)  # the others get no gradient
    assert torch.allclose(grad[0], layers[0].dequantize().sum(0) + layers[2].dequantize().sum(0), atol=1e-3)
    apart = layer(64, 1024).cuda()  # another column scale: one by one
    assert torch.equal(higgs.linear_shared(x, [layers[0], apart])[1], apart(x))


def test_the_weights_are_on_the_device_once() -> None:
    module = layer(2048, 2048)
    stored = module.format.stored_bytes(column_scale=True)
    before = torch.cuda.memory_allocated()
    module.cuda()
    assert torch.cuda.memory_allocated() - before < 1.1 * stored
    assert module.indices is None and module.scales is None and module.tiled.is_cuda


@pytest.mark.parametrize("grid", ["p2_n256", "p2_n64", "p4_n256", "p4_n4096", "ch8"])
def test_moves_and_copies_keep_every_byte(grid: str) -> None:
    module = layer(50, 576, grid)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def unchanged(state: dict[str, torch.Tensor]) -> bool:
        return state.keys() == before.keys() and all(same_bits(state[name], t) for name, t in before.items())

    x = torch.randn(3, 576, device="cuda")
    module.cuda()
    y, address = module(x), module.tiled.data_ptr()
    assert unchanged(module.state_dict())
    assert module.to("cuda").tiled.data_ptr() == address  # a captured graph stays valid
    twin = copy.deepcopy(module)
    assert twin.tiled is not None and twin.tiled.data_ptr() != address and torch.equal(twin(x), y)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert unchanged(torch.load(file, map_location="cpu", weights_only=False).state_dict())
    fresh = HiggsLinear(module.format, bias=True, column_scale=True, device="cuda")
    fresh.load_state_dict(before)
    assert fresh.tiled is not None and torch.equal(fresh(x), y)
    assert unchanged(module.cpu().state_dict()) and module.tiled is None
    module.half().cuda()
    assert module.input_vector.dtype == torch.float32 and module.bias.dtype == torch.float16
    assert module.cuda().bfloat16().column_scale.dtype == torch.float16
    assert all(same_bits(a, before[name]) for a, name in zip(module.stored(), ("indices", "scales"), strict=True))


def test_rows_too_long_for_shared_memory_are_quantized_all_the_same() -> None:
    fmt = higgs.layer_format(2, 53248, "p2_n256")
    weight = torch.randn(2, 53248)
    indices, scales, t2 = _ops.quantize(weight, fmt)
    on_device = _ops.quantize(weight.cuda(), fmt)
    assert on_device[0].is_cuda and same_bits(on_device[0], indices) and same_bits(on_device[1], scales)
    assert on_device[2] == pytest.approx(t2)


def test_plan_and_device_in_words() -> None:
    fmt = _core.Format("p2_n256", 4096, 4096, 1024, 1024, 0)
    assert "ctas=" in _core.cuda_plan([fmt, fmt], 8, 2)
    with pytest.raises(ValueError):
        _core.cuda_plan([fmt], 0, 2)
    assert _core.cuda_current_device()["name"] == torch.cuda.get_device_name()


def test_errors_name_the_value_and_what_is_allowed() -> None:
    module = layer(4, 128).cuda()
    with pytest.raises(ValueError, match="x has 64 features, the layer has in_features = 128"):
        module(torch.randn(1, 64, device="cuda"))
    with pytest.raises(TypeError, match="x is torch.float64"):
        module(torch.randn(1, 128, device="cuda").double())
    with pytest.raises(ValueError, match="x is on cpu, other tensors are on cuda:0"):
        module(torch.randn(1, 128))
    weight = torch.randn(4, 128, device="cuda")
    with pytest.raises(ValueError, match=r"column_scale\[0\] is 0"):
        _ops.quantize(weight, module.format, torch.zeros(128, dtype=torch.float16))
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"weight \[1, 2\] is nan"):
        _ops.quantize(weight, module.format)
    weight[1] = 1e6
    with pytest.raises(ValueError, match="a scale of row 1 does not fit in fp16"):
        _ops.quantize(weight, module.format)
