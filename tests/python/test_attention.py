"""``higgs_sdpa``: what transformers' "sdpa" says, without copies of keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import load_whole as load
from higgs.integrations import attention
from higgs.integrations.attention import NAME, grouped_sdpa
from test_transformers import FAMILIES, IDS, make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import sdpa_attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Who computes: "grouped" or "transformers", call by call."""
    found: list[str] = []

    def count(name: str, original: Any) -> Any:
        return lambda *args, **kwargs: (found.append(name), original(*args, **kwargs))[1]

    for name, function in (("grouped", "scaled_dot_product_attention"), ("transformers", "sdpa_attention_forward")):
        monkeypatch.setattr(attention, function, count(name, getattr(attention, function)))
    return found


def generated(model: transformers.PreTrainedModel, **options: Any) -> tuple[list, Tensor]:
    """Tokens for two prompts, of which one is padded on the left, and the logits that they were picked from."""
    ids = IDS.expand(2, -1).clone()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences.tolist(), torch.stack(out.logits)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_architectures(family: str, cache: dict[str, str], calls: list[str], tmp_path: Path) -> None:
    path = make(family, tmp_path)
    tokens, logits = generated(load(path), **cache)
    model = load(path, attn_implementation=NAME)
    same_tokens, same_logits = generated(model, **cache)
    assert same_tokens == tokens and torch.allclose(same_logits, logits, rtol=1e-4, atol=1e-5)
    grouped = family not in ("opt", "gpt2-conv1d")
    assert calls == 2 * ["transformers"] + 22 * ["grouped" if grouped else "transformers"]
    torch.testing.assert_close(model(IDS).logits, load(path)(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("cudnn", [False, True])
def test_one_token_a_sequence(mask: str, dtype: torch.dtype, cudnn: bool, calls: list[str], monkeypatch) -> None:
    """Against the formula in float64."""
    monkeypatch.setattr(attention, "_cudnn_comes_first", lambda device: cudnn)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, h, m, 16, generator=generator).to(dtype) for h, m in ((6, 1), (2, 9), (2, 9)))
    seen = torch.rand(3, 1, 1, 9, generator=generator) < 0.6
    seen[..., 0] = True
    bias = torch.zeros(3, 1, 1, 9).masked_fill(~seen, float("-inf"))
    monkeypatch.setattr(sdpa_attention, "repeat_kv", None)
    given = seen if mask == "bool" else bias.to(dtype)
    y, weights = grouped_sdpa(nn.Identity(), query, key, value, given, scaling=0.3)
    k, v = (t.double().repeat_interleave(3, dim=1) for t in (key, value))
    expected = (0.3 * query.double() @ k.mT + bias).softmax(-1) @ v
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(y.double(), expected.transpose(1, 2), rtol=tolerance, atol=tolerance)
    assert y.dtype == dtype and y.is_contiguous() and weights is None and calls == ["grouped"]


@pytest.mark.parametrize("case", ["prefill", "no mask", "mask of each head", "position bias", "one head a key head"])
def test_everything_else_is_left_to_transformers(case: str, calls: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    m, heads = 4 if case == "prefill" else 1, 2 if case == "one head a key head" else 6
    query, key, value = (torch.randn(3, h, n, 16, generator=generator) for h, n in ((heads, m), (2, 9), (2, 9)))
    mask = torch.rand(3, heads if case == "mask of each head" else 1, m, 9, generator=generator) < 0.9
    options: dict[str, Any] = {"position_bias": torch.randn(1, heads, m, 9)} if case == "position bias" else {}
    module = nn.Module()
    module.num_key_value_groups = heads // 2
    given = None if case == "no mask" else mask
    found, _ = grouped_sdpa(module, query, key, value, given, scaling=0.3, **options)
    assert calls == ["transformers"]
    expected, _ = sdpa_attention.sdpa_attention_forward(module, query, key, value, given, scaling=0.3, **options)
    assert torch.equal(found, expected)


def test_refused_where_it_would_be_wrong(tmp_path: Path) -> None:
    """Models whose attention SDPA cannot compute, and paged attention."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 64, "vocab_size": 32, "num_local_experts": 2, "head_dim": 16}  # fmt: skip
    with pytest.raises(ValueError, match="does not support an attention implementation through torch"):
        AutoModelForCausalLM.from_config(transformers.GptOssConfig(**sizes), attn_implementation=NAME)
    model = load(make("llama", tmp_path), attn_implementation=NAME)
    with pytest.raises(ValueError, match=r'attn_implementation="paged\|higgs_sdpa"` is not supported'):
        model.generate_batch([[5, 7]])
