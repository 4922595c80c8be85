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
from higgs.linear import constant, pending
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
            if type(m) is HiggsLinear:  # experts stay on the CPU
                fmt, digest = m.format, None if m.column_scale is None else tuple(m.column_scale.tolist())
                m.tiled, m.input_vector = constant(m.indices.view(-1).clone()), torch.empty(fmt.k)
                m.input_key = (fmt.k, fmt.block, fmt.seed, digest)
                self.stored[m.tiled.data_ptr()] = (m.indices, m.scales, m.column_scale, m._arguments)
                m.indices = m.scales = None

    def linear_tiled(self, x, tiled, input_vector, biases, has_bias, grids, rows, groups, block) -> list[Tensor]:
        self.calls.append(len(tiled))
        given = iter(biases)
        calls = [
            (self.stored[t.data_ptr()], next(given) if has else None) for t, has in zip(tiled, has_bias, strict=True)
        ]
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
    assert not pending

    device.calls.clear()
    assert higgs.share_inputs_(model, False) == names
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
    assert device.calls == [1] * (8 + 3 * mlps)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def static_decode(model: PreTrainedModel, **compile_options: Any) -> Tensor:
    """Logits of three steps with a static cache."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    forward = torch.compile(model.forward, **compile_options) if compile_options else model.forward
    logits = []
    with torch.no_grad():
        model(IDS[:, :4], past_key_values=cache)  # makes the cache
        for i in range(4, 7):
            position = torch.tensor([i])
            step = {"past_key_values": cache, "cache_position": position, "position_ids": position[None]}
            logits.append(forward(IDS[:, i : i + 1], **step).logits)
    return torch.stack(logits)


@pytest.mark.parametrize("by_layer", [False, True])
def test_one_graph_compiled_once(by_layer: bool, device: TiledOnCpu, monkeypatch) -> None:
    model = make(num_hidden_layers=4)
    device.tile(model)
    expected = static_decode(model)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    if by_layer:
        layer = type(model.model.layers[0])
        monkeypatch.setattr(layer, "forward", torch.compiler.nested_compile_region(layer.forward))
    device.calls.clear()
    found = static_decode(model, backend=backend, fullgraph=True, dynamic=False)
    assert torch.equal(found, expected)
    assert len(graphs) == 1 and device.calls[-16:] == [3, 1, 2, 1] * 4
    regions = [m for name, m in graphs[0].named_children() if "subgraph" in name]
    assert len(regions) == by_layer  # the layers are one region, in spite of their signs
    target = torch.ops.higgs.linear_tiled
    nodes = [node for g in (graphs[0], *regions) for node in g.graph.nodes if node.target in (target, target.default)]
    assert len(nodes) == (4 if by_layer else 16)


def calls_of(model: nn.Module, device: TiledOnCpu) -> list[int]:
    device.calls.clear()
    with torch.no_grad():
        model(IDS)
    return device.calls


def test_gradients(device: TiledOnCpu) -> None:
    """Of x, through all three outputs, and of biases; also where one output is not used."""
    model = make("Qwen2")
    twin = copy.deepcopy(model)
    device.tile(model)
    for m in (model, twin):
        m(IDS, labels=IDS).loss.backward()
    expected = dict(twin.named_parameters())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert "model.layers.0.self_attn.v_proj.bias" in found and "model.embed_tokens.weight" in found
    assert found.keys() == {name for name, p in expected.items() if p.grad is not None}
    assert all(torch.allclose(grad, expected[name].grad, rtol=1e-3, atol=1e-6) for name, grad in found.items())

    attention, x = model.model.layers[0].self_attn, torch.randn(2, 128, requires_grad=True)
    outputs = higgs.linear_shared(x, [attention.q_proj, attention.k_proj, attention.v_proj])
    outputs[1].sum().backward()
    assert torch.allclose(x.grad, twin.model.layers[0].self_attn.k_proj.dequantize().sum(0).expand(2, -1), atol=1e-4)


def test_with_adapters(device: TiledOnCpu) -> None:
    peft = pytest.importorskip("peft")
    model = make()
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    tuned = peft.get_peft_model(model, config).eval()
    expected = tuned(IDS).logits
    device.tile(tuned)
    assert torch.equal(tuned(IDS).logits, expected) and device.calls == [3, 1, 2, 1] * 2
    assert torch.equal(tuned(IDS, labels=IDS).logits, expected)


def test_a_layer_that_gets_another_input_computes_it(device: TiledOnCpu) -> None:
    """Hooks that change the input of one layer, or look at outputs, work as ever."""
    model, seen = make(), []
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    attention.v_proj.register_forward_hook(lambda _, args, y: seen.append(y))
    expected = model(IDS).logits
    device.tile(model)
    assert torch.equal(model(IDS).logits, expected) and torch.equal(*seen)
    assert device.calls == [3, 1, 1, 2, 1, 3, 1, 2, 1]

    x = torch.randn(3, 128)
    with torch.no_grad():
        before = attention.q_proj(x)
        x += 1
        assert torch.equal(attention.k_proj(x), attention.k_proj(2 * x / 2)) and not torch.equal(
            attention.q_proj(x), before
        )


def test_nothing_is_left_after_an_error(device: TiledOnCpu) -> None:
    model = make()
    device.tile(model)
    layer = model.model.layers[0].self_attn
    handle = layer.k_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS)
    assert not pending
    handle.remove()
    model(IDS)


def test_layers_that_do_not_rotate_alike_or_are_not_quantized_are_called_one_by_one(device: TiledOnCpu) -> None:
    model = make()
    model.model.layers[0].self_attn.k_proj = model.model.layers[0].self_attn.k_proj.to_linear()
    expected = model(IDS).logits
    device.tile(model)
    model.model.layers[0].mlp.up_proj.input_key = ("another",)
    assert torch.equal(model(IDS).logits, expected)
    assert device.calls == [1, 1, 1, 1, 1, 1, 3, 1, 2, 1]


def test_copies_and_pickles(device: TiledOnCpu) -> None:
    model = make()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert higgs.share_inputs_(twin) == higgs.share_inputs_(model)
        device.tile(twin)
        assert calls_of(twin, device) == [3, 1, 2, 1] * 2
    assert calls_of(model, device) == []


def test_switched_off_by_dequantize_and_unknown_architectures() -> None:
    model = make()
    names = higgs.share_inputs_(model)
    assert names == [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")]
    attention = model.model.layers[0].self_attn
    assert len(attention._forward_hooks) == len(attention._forward_pre_hooks) == 1
    higgs.dequantize_(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert higgs.share_inputs_(type("LlamaMLP", (nn.Module,), {})()) == []
