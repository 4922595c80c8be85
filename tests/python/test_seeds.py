"""Seeds of the signs: one for each input, whatever path, order or part of the model."""

from __future__ import annotations

import json

import higgs
import pytest
import torch
from conftest import load, random_energies
from higgs.checkpoint import inspect_checkpoint, quantize_checkpoint
from higgs.config import QuantizationConfig
from higgs.energies import Energies
from higgs.seeds import layer_seeds
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

LEAVES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
LAYERS = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in LEAVES]


def test_layers_that_read_the_same_input_share_signs_and_no_others() -> None:
    seeds = layer_seeds(0, LAYERS)
    inputs: dict[int, list[str]] = {}
    for layer, seed in seeds.items():
        inputs.setdefault(seed, []).append(layer)
    expected = [[f"model.layers.{i}.{leaf}" for leaf in LEAVES[a:b]] for i in range(12)
                for a, b in ((0, 3), (3, 4), (4, 6), (6, 7))]  # fmt: skip
    assert list(inputs.values()) == expected
    assert not set(seeds.values()) & set(layer_seeds(1, LAYERS).values())


def test_seeds_are_the_same_for_ever() -> None:
    assert layer_seeds(0, ["model.layers.0.self_attn.v_proj"]) == {"model.layers.0.self_attn.v_proj": 8317069393670199}
    assert layer_seeds(7, ["x"]) == {"x": 5639600137638592}


@given(st.permutations(LAYERS[:14]), st.integers(1, 14), st.integers(0, 2**63 - 1))
def test_seeds_depend_on_no_other_layer_and_no_order(layers: list[str], count: int, seed: int) -> None:
    whole = layer_seeds(seed, LAYERS)
    assert layer_seeds(seed, layers[:count]) == {layer: whole[layer] for layer in layers[:count]}
    assert all(0 <= s < 2**53 for s in whole.values())


def test_what_a_forward_pass_saw_goes_before_names() -> None:
    names = ["a.q_proj", "a.k_proj", "a.v_proj", "b.fc", "c.unseen"]
    a = torch.ones(64)
    seen = Energies(dict.fromkeys(names[:4], a), [["a.q_proj", "b.fc"], ["a.v_proj", "a.k_proj"]], "random")
    seeds = layer_seeds(0, names, seen)
    assert seeds["a.q_proj"] == seeds["b.fc"] != seeds["a.k_proj"] == seeds["a.v_proj"]
    assert seeds["c.unseen"] == layer_seeds(0, ["c.unseen"])["c.unseen"]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("seed", [0, 5])
def test_in_memory_and_streamed_are_the_same_bytes(sharded, tmp_path, scaled, seed) -> None:
    energies = random_energies(sharded) if scaled else None
    quantize_checkpoint(sharded, tmp_path / "streamed", bits=3, seed=seed, energies=energies)
    model = AutoModelForCausalLM.from_pretrained(sharded)
    higgs.quantize_(model, bits=3, seed=seed, scales=energies or "none")
    model.save_pretrained(tmp_path / "memory")
    streamed, memory = load(tmp_path / "streamed"), load(tmp_path / "memory")
    assert streamed.keys() == memory.keys()
    assert all(torch.equal(streamed[name], memory[name]) for name in streamed)
    configs = [
        QuantizationConfig.from_dict(json.loads((tmp_path / path / "config.json").read_text())["quantization_config"])
        for path in ("streamed", "memory")
    ]
    assert configs[0] == configs[1]
    assert {x.layer: x.seed for x in inspect_checkpoint(tmp_path / "memory").layers} == layer_seeds(seed, LAYERS[:14])


def test_the_stored_seed_is_what_counts(checkpoint, tmp_path) -> None:
    quantize_checkpoint(checkpoint, tmp_path / "out")
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(9)[None]).logits
    config = json.loads((tmp_path / "out/config.json").read_text())
    entry = config["quantization_config"]["layers"]["model.layers.0.mlp.down_proj"]
    for seed, message in (
        (-1, "seed -1 is not supported"),
        ("many", "not supported between"),
        (None, "expected grid, block, group, seed"),
    ):
        entry["seed"] = seed
        if seed is None:
            del entry["seed"]
        (tmp_path / "out/config.json").write_text(json.dumps(config))
        for read in (inspect_checkpoint, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(higgs.FormatError, match=f"layer model.layers.0.mlp.down_proj.*{message}"):
                read(tmp_path / "out")
    entry["seed"] = 1
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(9)[None]).logits
    assert not torch.allclose(other, logits)
