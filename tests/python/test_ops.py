"""The torch operators: numbers, golden files, registration, errors."""

from __future__ import annotations

import json
from pathlib import Path

import higgs
import numpy as np
import pytest
import torch
from higgs import _core, _ops
from higgs.devices import pick_device
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
GRIDS = [g.name for g in higgs.grids()]


def packed(n: int, k: int, grid: str, *, column_scale: bool = False, seed: int = 3, **options):
    """Random weights, quantized: (weight, format, indices, scales, column_scale)."""
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator)
    fmt = higgs.layer_format(n, k, grid, seed=seed, **options)
    scale = (0.5 + torch.rand(k, generator=generator)).half() if column_scale else None
    indices, scales, _ = _ops.quantize(weight, fmt, scale)
    return weight, fmt, indices, scales, scale


def arguments(fmt: higgs.LayerFormat) -> tuple[str, int, int, int]:
    return fmt.grid, fmt.block, fmt.group, fmt.seed


@pytest.mark.parametrize("case", [c for c in CASES if c["seed"] < 2**63], ids=lambda c: c["name"])
def test_golden_files(case: dict) -> None:
    def read(array: str, dtype: type, *shape: int) -> torch.Tensor:
        return torch.from_numpy(np.fromfile(GOLDEN / f"{case['name']}.{array}.bin", dtype=dtype).reshape(shape))

    n, k = case["n"], case["k"]
    fmt = higgs.layer_format(n, k, case["grid"], block=case["block"], group=case["group"], seed=case["seed"])
    indices = read("indices", np.uint8, n, case["row_bytes"])
    scales = read("scales", np.float16, n, case["row_groups"])
    column_scale = read("column_scale", np.float16, k) if case["column_scale"] else None
    got_indices, got_scales, _ = _ops.quantize(read("weights", np.float32, n, k), fmt, column_scale)
    assert torch.equal(got_indices, indices) and torch.equal(got_scales, scales)
    restored = _ops.dequantize(indices, scales, column_scale, *arguments(fmt), torch.float32)
    assert torch.equal(restored.view(torch.int32), read("dequantized", np.int32, n, k))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_is_as_exact_as_torch(grid: str, dtype: torch.dtype) -> None:
    _, fmt, indices, scales, scale = packed(37, 576, grid, column_scale=True)
    x, bias = torch.randn(5, 576).to(dtype), torch.randn(37).to(dtype)
    restored = _ops.dequantize(indices, scales, scale, *arguments(fmt), torch.float32)
    exact = x.double() @ restored.double().T + bias.double()
    y = _ops.linear(x, indices, scales, scale, bias, *arguments(fmt))
    assert y.dtype == dtype and y.shape == (5, 37)
    reference = torch.nn.functional.linear(x, restored.to(dtype), bias)
    error, reference_error = ((y - exact).norm().item(), (reference - exact).norm().item())
    assert error <= 2 * reference_error


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40), blocks=st.integers(1, 20), rows=st.integers(0, 6), grid=st.sampled_from(GRIDS),
    seed=st.integers(0, 2**63 - 1), isa=st.sampled_from(_core.supported_isas()),
)  # fmt: skip
def test_any_shape(n: int, blocks: int, rows: int, grid: str, seed: int, isa: str) -> None:
    before = _core.current_isa()
    _core.set_isa(isa)
    try:
        check_shape(n, blocks, rows, grid, seed)
    finally:
        _core.set_isa(before)


def check_shape(n: int, blocks: int, rows: int, grid: str, seed: int) -> None:
    _, fmt, indices, scales, _ = packed(n, 64 * blocks, grid, seed=seed)
    restored = _ops.dequantize(indices, scales, None, *arguments(fmt), torch.float32)
    x = torch.randn(rows, 64 * blocks)
    y = _ops.linear(x, indices, scales, None, None, *arguments(fmt))
    assert torch.allclose(y.double(), x.double() @ restored.double().T, atol=1e-3 * 64 * blocks**0.5)
    for i in range(rows):  # a row does not depend on its batch
        assert torch.equal(_ops.linear(x[i], indices, scales, None, None, *arguments(fmt)), y[i])


@pytest.mark.parametrize("isa", _core.supported_isas())
def test_every_instruction_set_writes_the_same_bytes(isa: str) -> None:
    before = _core.current_isa()
    expected = packed(9, 320, "p2_n64")[2:4]
    try:
        _core.set_isa(isa)
        got = packed(9, 320, "p2_n64")[2:4]
    finally:
        _core.set_isa(before)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_opcheck_and_compile() -> None:
    _, fmt, indices, scales, scale = packed(16, 128, "p2_n256", column_scale=True)
    x = torch.randn(2, 3, 128)
    args = (x, indices, scales, scale, torch.randn(16), *arguments(fmt))
    torch.library.opcheck(torch.ops.higgs.linear, args)
    torch.library.opcheck(torch.ops.higgs.dequantize, (indices, scales, scale, *arguments(fmt), torch.bfloat16))
    compiled = torch.compile(lambda x: torch.ops.higgs.linear(x, *args[1:]) * 2, fullgraph=True)
    assert torch.equal(compiled(x), torch.ops.higgs.linear(*args) * 2)


def test_gradient_of_x_and_bias() -> None:
    _, fmt, indices, scales, scale = packed(16, 128, "p2_n256", column_scale=True)
    restored = _ops.dequantize(indices, scales, scale, *arguments(fmt), torch.float32)
    x, bias = torch.randn(4, 128, requires_grad=True), torch.randn(16, requires_grad=True)
    grad = torch.randn(4, 16)
    _ops.linear(x, indices, scales, scale, bias, *arguments(fmt)).backward(grad)
    assert torch.allclose(x.grad, grad @ restored, atol=1e-4)
    assert torch.allclose(bias.grad, grad.sum(0), atol=1e-5)


def test_without_the_dispatcher_the_same() -> None:
    """A call that needs no dispatcher skips it; one under a mode, in a transform or for another device does not."""
    _, fmt, indices, scales, scale = packed(16, 128, "p2_n256", column_scale=True)
    x, bias = torch.randn(3, 128), torch.randn(16)
    rest = (indices, scales, scale, bias, *arguments(fmt))
    expected = torch.ops.higgs.linear(x, *rest)
    assert _ops.direct(x) and not _ops.linear(x, *rest).requires_grad
    assert torch.equal(_ops.linear(x, *rest), expected)
    with FlopCounterMode(display=False):  # a dispatch mode
        assert not _ops.direct(x) and torch.equal(_ops.linear(x, *rest), expected)
    found = torch.func.vmap(lambda x: (_ops.direct(x), _ops.linear(x, *rest))[1])(x)
    assert torch.allclose(found, expected)
    assert not _ops.direct(x.to("meta")) and not _ops.direct(torch.nn.Parameter(x))
    with pytest.raises(higgs.UnsupportedError, match="forward-mode derivatives"):
        torch.func.jvp(lambda x: _ops.linear(x, *rest), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        assert not _ops.direct(x) and torch.equal(_ops.linear(x, *rest), expected)
    for needs in (x, bias):
        needs.requires_grad_()
        assert _ops.linear(x, *rest).requires_grad and torch.ops.higgs.linear(x, *rest).requires_grad
        with torch.no_grad():
            assert not _ops.linear(x, *rest).requires_grad
        torch.library.opcheck(torch.ops.higgs.linear, (x, *rest))
        needs.requires_grad_(False)


def test_errors_name_the_value_and_what_is_allowed() -> None:
    _, fmt, indices, scales, _ = packed(4, 128, "p2_n256")
    call = arguments(fmt)
    with pytest.raises(ValueError, match="unknown grid 'p3_n7'; use one of p1_n4"):
        higgs.layer_format(4, 128, "p3_n7")
    with pytest.raises(ValueError, match="k = 100 .* multiple of 64"):
        higgs.layer_format(4, 100, "p2_n256")
    with pytest.raises(ValueError, match=r"block 96 .* use a multiple of 64 in 64..1024"):
        higgs.layer_format(4, 192, "p2_n256", block=96)
    with pytest.raises(ValueError, match="group 100 .* multiple of block 128"):
        higgs.layer_format(4, 128, "p2_n256", group=100)
    with pytest.raises(ValueError, match=r"seed -1 .* 0 to 2\*\*63 - 1"):
        higgs.layer_format(4, 128, "p2_n256", seed=-1)
    with pytest.raises(ValueError, match="no grid of 3.7 bits; use one of 1, 1.5, 2, 2.5"):
        higgs.grid_for_bits(3.7)
    with pytest.raises(ValueError, match="x has 64 features, the layer has in_features = 128"):
        _ops.linear(torch.randn(1, 64), indices, scales, None, None, *call)
    with pytest.raises(ValueError, match="x has no features"):
        _ops.linear(torch.tensor(1.0), indices, scales, None, None, *call)
    with pytest.raises(ValueError, match=r"indices has shape \[256\], expected \[n, row_bytes\]"):
        _ops.linear(torch.randn(1, 128), indices.flatten(), scales, None, None, *call)
    with pytest.raises(TypeError, match="x is torch.float64"):
        _ops.linear(torch.randn(1, 128).double(), indices, scales, None, None, *call)
    with pytest.raises(TypeError, match="scales is torch.float32; use torch.float16"):
        _ops.linear(torch.randn(1, 128), indices, scales.float(), None, None, *call)
    with pytest.raises(ValueError, match=r"scales has shape \[4, 2\], expected \[4, 1\]"):
        _ops.linear(torch.randn(1, 128), indices, scales.expand(4, 2), None, None, *call)
    with pytest.raises(ValueError, match=r"weight \[1, 2\] is nan"):
        _ops.quantize(torch.randn(4, 128).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)), fmt)
    with pytest.raises(ValueError, match=r"column_scale\[0\] is 0"):
        _ops.quantize(torch.randn(4, 128), fmt, torch.zeros(128, dtype=torch.float16))
    with pytest.raises(ValueError, match="threads 0 is not supported; use 1 to 1024"):
        _core.set_num_threads(0)


def test_cuda_is_there_or_says_that_it_is_not() -> None:
    fmt = _core.Format("p2_n256", 32, 256, 256, 256, 0)
    if _core.with_cuda:
        assert _core.cuda_tiled_bytes(fmt) >= 32 * 256 // 2  # needs no device
    else:
        assert _core.cuda_device_count() == 0
        with pytest.raises(higgs.UnsupportedError, match="no CUDA kernels; .*HIGGS_CUDA=ON"):
            _core.cuda_tiled_bytes(fmt)
        with pytest.raises(higgs.UnsupportedError, match="no CUDA kernels"):
            _core.cuda_current_device()


def test_pick_device() -> None:
    usable = _core.with_cuda and torch.cuda.is_available()
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto") == torch.device("cuda:0" if usable else "cpu")
    for name in ("tpu", "meta", "cuda:x", ""):
        with pytest.raises(ValueError, match="use auto, cpu, cuda or cuda:N"):
            pick_device(name)
    with pytest.raises(higgs.UnsupportedError, match="device 'cuda:99' cannot be used: "):
        pick_device("cuda:99")
