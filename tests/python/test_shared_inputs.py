"""q/k/v and gate/up in one launch, on the CPU: a stand-in computes what the CUDA operator would."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import higgs
import pytest
import torch
import transformers
from higgs import HiggsLinear, _cpu, _cuda, shared_inputs
from higgs.linear import constant
from torch import Tensor, nn
from transformers import PreTrainedModel

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(20)[None] * 5 % 256
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_local_experts": 2,
}  # fmt: skip


class TiledOnCpu:
    """Layers that think they are on a CUDA device, and the operator that they call there, which counts its calls."""

    def __init__(self) -> None:
        self.stored: dict[int, tuple[Any, ...]] = {}  # by the address of ``tiled``
        self.calls: list[int] = []  # layers of each call

    def tile(self, model: nn.Module) -> None:
        for m in model.modules():
            if isinstance(m, HiggsLinear):
                fmt, digest = m.format, None if m.column_scale is None else tuple(m.column_scale.tolist())
                m.tiled, m.input_vector = constant(m.indices.view(-1).clone()), torch.empty(fmt.k)
                m.input_key = (fmt.k, fmt.block, fmt.seed, digest)
                self.stored[m.tiled.data_ptr()] = (m.indices, m.scales, m.column_scale, m._arguments())
                m.indices = m.scales = None

    def linear_tiled(self, x, tiled, input_vector, biases, has_bias, grids, rows, groups, block) -> list[Tensor]:
        self.calls.append(len(tiled))
        given = iter(biases)
        calls = [(self.stored[t.data_ptr()], next(given) if has else None) for t, has in zip(tiled, has_bias, strict=True)]
        return [_cpu.linear(x, *packed, bias, *arguments) for (*packed, arguments), bias in calls]

    def linear_tiled_grad(self, grads, tiled, input_vector, grids, groups, block) -> Tensor:
        calls = [self.stored[t.data_ptr()] for t in tiled]
        weights = [_cpu.dequantize(*packed, *arguments, torch.float32) for *packed, arguments in calls]
        return torch.stack([grad @ w for grad, w in zip(grads, weights, strict=True)]).sum(0)


@pytest.fixture
def device(monkeypatch) -> Iterator[TiledOnCpu]:
    stand_in = TiledOnCpu()
    monkeypatch.setattr(_cuda, "linear_tiled", stand_in.linear_tiled)
    with torch.library._scoped_library("higgs", "IMPL") as library:
        library.impl("linear_tiled", stand_in.linear_tiled, "CPU")
        library.impl("linear_tiled_grad", stand_in.linear_tiled_grad, "CPU")
        yield stand_in


def make(family: str = "Llama", **options: Any) -> PreTrainedModel:
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**{**SIZES, **options})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else 0.05)
    higgs.quantize_(model, grid="p2_n256", scales="random")
    return model


@pytest.mark.parametrize("family", sorted(shared_inputs._FAMILIES))
def test_every_known_architecture_computes_the_same_in_fewer_calls(family: str, device: TiledOnCpu) -> None:
    model = make(family)
    names = higgs.share_inputs_(model)
    mlps = 0 if family == "Mixtral" else 2  # whose experts are no modules
    assert len(names) == 2 + mlps and len(set(names)) == len(names)
    expected = model(IDS).logits
    device.tile(model)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
    assert device.calls == [3, 1, *[2, 1] * (mlps // 2)] * 2
    assert all(m.pending is None for m in model.modules() if isinstance(m, HiggsLinear))

    device.calls.clear()
    assert higgs.share_inputs_(model, False) == names
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
    assert device.calls == [1] * (8 + 3 * mlps)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
