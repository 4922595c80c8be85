"""Quantized input embeddings: rows decoded as they are looked up."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import higgs
import pytest
import torch
import transformers
from conftest import load_whole as load
from higgs import HiggsQuantConfig
from higgs.checkpoint import inspect_checkpoint, quantize_checkpoint
from higgs.embedding import HiggsEmbedding
from test_transformers import IDS, assert_same, make, tokens
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

TIED = "output head lm_head shares its weight; give lm_head_grid, too"


def quantized(vocabulary: int = 40, k: int = 128, grid: str = "p2_n256") -> tuple[nn.Embedding, HiggsEmbedding]:
    torch.manual_seed(0)
    embedding = nn.Embedding(vocabulary, k, padding_idx=3)
    module, t2 = HiggsEmbedding.from_linear(embedding, higgs.layer_format(vocabulary, k, grid, seed=5))
    assert 0 < t2 < 0.01
    return embedding, module  # type: ignore[return-value]


@pytest.mark.parametrize("grid", ["p2_n256", "ch8", "p4_n256", "p4_n4096"])
def test_rows_are_those_of_the_dequantized_matrix(grid: str) -> None:
    embedding = nn.Embedding(40, 128)
    module, _ = HiggsEmbedding.from_linear(embedding, higgs.layer_format(40, 128, grid))
    for shape in ((), (7,), (2, 3, 5), (0,), (2, 0)):
        ids = torch.randint(40, shape)
        y = module(ids)
        assert y.shape == (*shape, 128) and torch.equal(y, module.dequantize()[ids])
    with pytest.raises(IndexError):
        module(torch.tensor([40]))


def test_dtype_copies_and_the_way_back() -> None:
    embedding, module = quantized()
    ids = torch.tensor([[1, 39], [3, 0]])
    expected = module(ids)
    assert (expected - embedding(ids)).norm() < 0.1 * expected.norm() and expected.dtype == torch.float32
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(ids), expected)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16 and torch.equal(half(ids), module.dequantize(torch.bfloat16)[ids])
    assert half.scales.dtype == torch.float16 and half.state_dict().keys() == {"indices", "scales"}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), expected)
    back = module.to_linear()
    assert type(back) is nn.Embedding and (back.num_embeddings, back.embedding_dim, back.padding_idx) == (40, 128, 3)
    assert torch.equal(back(ids), expected)


@pytest.mark.parametrize(("family", "head"), [("llama", None), ("llama", "ch8"), ("llama-narrow", "ch8")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ways_to_quantize_give_one_model(family: str, head: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    path, options = make(family, tmp_path / "o"), {"bits": 4, "lm_head_grid": head, "embedding_grid": "p2_n1024"}
    expected = load(path, dtype=dtype)
    weight = expected.get_input_embeddings().weight.detach().clone()
    report = higgs.quantize_(expected, scales="none", **options)
    assert sum(r.layer == "model.embed_tokens" and r.grid == "p2_n1024" for r in report.layers) == 1
    assert type(expected.get_input_embeddings()) is HiggsEmbedding
    assert (expected.get_input_embeddings().dequantize() - weight).norm() < 0.05 * weight.norm()
    model = load(path, dtype=dtype, quantization_config=HiggsQuantConfig(**options))
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved", dtype=dtype)
    assert_same(loaded, expected)
    assert tokens(loaded) == tokens(expected) and loaded(IDS).logits.dtype == dtype
    if dtype == torch.float32:
        quantize_checkpoint(path, tmp_path / "streamed", **options)
        assert_same(load(tmp_path / "streamed"), expected)
        assert "model.embed_tokens" in {layer.layer for layer in inspect_checkpoint(tmp_path / "streamed").layers}
    restored = loaded.dequantize()
    assert type(restored.get_input_embeddings()) is nn.Embedding
    assert torch.equal(restored.get_input_embeddings().weight, expected.get_input_embeddings().dequantize(dtype))


def test_allocation_and_column_scales(tmp_path: Path) -> None:
    path = make("llama", tmp_path)
    model = load(path)
    grids = {"model.embed_tokens": "ch8", "model.layers.1.mlp.up_proj": "p2_n256"}
    report = higgs.quantize_(model, allocation=grids, scales="random")
    assert {r.layer: (r.grid, r.column_scale) for r in report.layers} == {
        "model.embed_tokens": ("ch8", False), "model.layers.1.mlp.up_proj": ("p2_n256", True)
    }  # fmt: skip


def test_a_tied_embedding_needs_a_head_of_its_own(tmp_path: Path) -> None:
    path, options = make("llama-narrow", tmp_path / "o"), {"bits": 4, "embedding_grid": "ch8"}
    with pytest.raises(ValueError, match=TIED):
        higgs.quantize_(load(path), scales="none", **options)
    with pytest.raises(ValueError, match=TIED):
        higgs.quantize_(load(path), allocation={"model.embed_tokens": "ch8"}, scales="none")
    with pytest.raises(ValueError, match=TIED):
        load(path, quantization_config=HiggsQuantConfig(**options))
    with pytest.raises(ValueError, match=TIED):
        quantize_checkpoint(path, tmp_path / "q", **options)
    assert not (tmp_path / "q").exists()
    quantize_checkpoint(path, tmp_path / "q", lm_head_grid="ch8", **options)
    assert json.loads((tmp_path / "q" / "config.json").read_text())["tie_word_embeddings"] is False


def test_bad_arguments(tmp_path: Path) -> None:
    path = make("llama", tmp_path / "o")
    with pytest.raises(ValueError, match="p9"):
        HiggsQuantConfig(bits=4, embedding_grid="p9")
    with pytest.raises(ValueError, match="p9"):
        quantize_checkpoint(path, tmp_path / "q", embedding_grid="p9")
    with pytest.raises(ValueError, match="embedding_grid and allocation: name the embedding in the allocation"):
        HiggsQuantConfig(allocation={"lm_head": "p2_n64"}, embedding_grid="ch8")
    with pytest.raises(higgs.UnsupportedError, match="no input embedding that is an nn.Embedding itself"):
        higgs.quantize_(load(make("gemma3-tied-odd", tmp_path / "g")), bits=4, embedding_grid="ch8")
    higgs.quantize_(model := load(path), bits=4, embedding_grid="ch8", scales="none")
    parallel: Any = load(path)
    parallel.config.distributed_config = transformers.distributed.DistributedConfig()
    quantizer = higgs.integrations.transformers.HiggsHfQuantizer(model.config.quantization_config)
    with pytest.raises(higgs.UnsupportedError, match="embed_tokens: quantized embeddings are not supported with distr"):
        quantizer.preprocess_model(parallel)
