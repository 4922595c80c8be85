"""Trellis grids through the Python package; their arithmetic is tested in C++, their operators with all other grids."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import higgs
import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from higgs.allocate import grid_menu
from higgs.checkpoint import inspect_checkpoint, quantize_checkpoint
from transformers import AutoModelForCausalLM

TRELLIS = [g.name for g in higgs.grids() if g.family == "trellis"]
IDS = torch.arange(40)[None] * 5 % 256


def test_grids_say_what_they_are() -> None:
    grid = higgs.find_grid("t2_b7")
    assert (grid.family, grid.p, grid.index_bits, grid.window_bits, grid.rate) == ("trellis", 2, 7, 16, 3.5)
    assert higgs.find_grid("p2_n128").window_bits == 7


def test_what_bits_and_menus_pick_is_a_vector_grid_unless_asked() -> None:
    assert higgs.grid_for_bits(4).name == "p2_n256"
    assert not {g.name for g in grid_menu()} & set(TRELLIS)
    assert [(g.name, float(g.rate)) for g in grid_menu(["a2_b8", "t2_b5"])] == [("a2_b8", 4.0), ("t2_b5", 2.5)]


def windows(stream: np.ndarray, bits: int, length: int) -> np.ndarray:
    """FORMAT.md, literally: the window of every step of one run, from its bits."""
    steps = len(stream) // bits
    at = (bits * np.arange(steps)[:, None] + np.arange(length)) % len(stream)
    return (stream[at].astype(np.int64) << np.arange(length)).sum(1)


@pytest.mark.parametrize("name", TRELLIS)
def test_stored_bytes_are_the_stream_of_the_format(name: str) -> None:
    grid = higgs.find_grid(name)
    points = np.array(grid.points, np.float32)
    torch.manual_seed(0)
    linear = torch.nn.Linear(832, 3, bias=False)
    fmt = higgs.layer_format(3, 832, name)
    layer, t2 = higgs.HiggsLinear.from_linear(linear, fmt)
    indices, scales = layer.stored()
    assert fmt.block == 832 and scales.shape == (3, 1)
    stream = np.unpackbits(indices.numpy(), axis=1, bitorder="little")
    strided = [columns // 4 for columns in (256, 256, 256, 64) for _ in range(4)]
    counts = [columns // grid.p * grid.index_bits for columns in (strided if name.startswith("a") else [832])]
    ends = np.cumsum([0, *counts])
    for i in range(3):
        runs = [windows(stream[i, a:b], grid.index_bits, grid.window_bits) for a, b in itertools.pairwise(ends)]
        rotated = float(scales[i, 0]) * points[np.concatenate(runs)].reshape(-1)
        restored = layer.dequantize()[i]
        # the transform is orthonormal: it keeps norms
        assert np.linalg.norm(rotated) == pytest.approx(float(restored.norm()), rel=1e-5)
    error = (layer.dequantize() - linear.weight).pow(2).sum() / linear.weight.pow(2).sum()
    assert float(error) == pytest.approx(t2, rel=1e-3) and t2 == pytest.approx(grid.t2, rel=0.15)


@pytest.mark.parametrize("name", ["t2_b6", "a2_b8"])
def test_a_checkpoint_loads_with_the_same_bits(name: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.float32)
    report = quantize_checkpoint(source, tmp_path / "out", grid=name)
    assert all(layer.grid == name for layer in report.layers)
    assert report.bits == pytest.approx(higgs.find_grid(name).rate, abs=0.3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {layer["grid"] for layer in config["layers"].values()} == {name}
    assert {layer.grid for layer in inspect_checkpoint(tmp_path / "out").layers} == {name}

    model = AutoModelForCausalLM.from_pretrained(source)
    original = model(IDS).logits
    higgs.quantize_(model, grid=name)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not torch.equal(model(IDS).logits, original)
