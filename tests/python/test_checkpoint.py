"""Streaming a checkpoint: the bytes, what is quantized, bad input."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import contents, load, make_checkpoint, random_energies, write_checkpoint
from higgs import FormatError, UnsupportedError, _ops, layer_format
from higgs._core import default_block
from higgs.checkpoint import Checkpoint, find_linear_weights, inspect_checkpoint, quantize_checkpoint
from higgs.checkpoint.files import read_header
from higgs.energies import Energies, column_scale, pooled_energy, weight_energy
from higgs.report import Report
from higgs.seeds import layer_seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file


@pytest.mark.parametrize(("shards", "tied"), [(1, True), (1, False), (4, True), (3, False)])
def test_quantizes_linears_and_copies_the_rest(tmp_path, shards, tied):
    source = make_checkpoint(tmp_path / "source", shards=shards, tied=tied)
    out = tmp_path / "out"
    report = quantize_checkpoint(source, out, grid="p2_n64", seed=7)
    before, after = load(source), load(out)
    assert len(report.layers) == 14 and not report.skipped
    seeds = layer_seeds(7, [layer.layer for layer in report.layers])
    for layer in report.layers:
        weight = before.pop(f"{layer.layer}.weight")
        fmt = layer_format(*weight.shape, "p2_n64", seed=seeds[layer.layer])
        indices, scales, t2 = _ops.quantize(weight, fmt)
        assert torch.equal(after.pop(f"{layer.layer}.indices"), indices)
        assert torch.equal(after.pop(f"{layer.layer}.scales"), scales)
        assert layer.t2 == t2 and layer.bits == fmt.bits()
    guard = after.pop("model.layers.0.mlp.down_proj.weight")  # for programs that do not know the format
    assert bytes(guard.numpy()) == b"quantized by higgs: install it and import higgs"
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(
            tensor.view(torch.uint8), after[name].view(torch.uint8)
        )
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    layers = config["quantization_config"]["layers"]
    assert {name: layer["seed"] for name, layer in layers.items()} == seeds
    assert (out / "model.safetensors.index.json").exists() == (shards > 1)
    assert len(list(out.glob("*.safetensors"))) == shards
    assert (out / "LICENSE").read_text() == "as you like\n" and (out / "generation_config.json").exists()
    assert not (out / ".higgs").exists() and not list(out.glob("*.tmp"))


def test_index_names_the_shard_of_every_tensor(sharded, tmp_path):
    quantize_checkpoint(sharded, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "out" / shard, "pt") as f:
            assert name in f.keys() and f.metadata() == {"format": "pt"}  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load(tmp_path / "out").values())


def test_layers_with_one_input_share_a_column_scale(sharded, tmp_path):
    energies = random_energies(sharded)
    report = quantize_checkpoint(sharded, tmp_path / "out", energies=energies, scale_exponent=0.2)
    before, after = load(sharded), load(tmp_path / "out")
    assert all(layer.column_scale for layer in report.layers)
    for group in energies.shared:
        a = energies.energies[group[0]]
        pooled = pooled_energy(a, [weight_energy(before[f"{name}.weight"]) for name in group])
        expected = column_scale(a, pooled, 0.2, block=default_block(len(a)))
        for name in group:
            assert torch.equal(after[f"{name}.column_scale"], expected)
    name = energies.shared[0][1]
    weight = before[f"{name}.weight"]
    s = after[f"{name}.column_scale"]
    fmt = layer_format(*weight.shape, "p2_n256", seed=layer_seeds(0, [name], energies)[name])
    indices, _, _ = _ops.quantize(weight, fmt, s)
    assert torch.equal(after[f"{name}.indices"], indices)
    assert any("sharing column scales" in note for note in report.notes)


def test_energies_of_another_model(checkpoint, tmp_path):
    energies = random_energies(checkpoint)
    name = "model.layers.0.mlp.down_proj"
    short = Energies({**energies.energies, name: torch.ones(64)}, energies.shared, "x")
    with pytest.raises(ValueError, match=rf"{name} have shape \[64\], expected \[192\]"):
        quantize_checkpoint(checkpoint, tmp_path / "out", energies=short)
    with pytest.raises(ValueError, match="another model"):
        quantize_checkpoint(checkpoint, tmp_path / "out", energies=Energies({"x": torch.ones(64)}, [["x"]], "x"))


@pytest.mark.parametrize("shards", [1, 4])
def test_tied_head_gets_tensors_of_its_own(tmp_path, shards):
    source = make_checkpoint(tmp_path / "source", shards=shards)
    report = quantize_checkpoint(source, tmp_path / "out", grid="p2_n64", lm_head_grid="ch8")
    before, after = load(source), load(tmp_path / "out")
    embedding = before["model.embed_tokens.weight"]
    indices, scales, _ = _ops.quantize(
        embedding, layer_format(256, 128, "ch8", seed=layer_seeds(0, ["lm_head"])["lm_head"])
    )
    assert torch.equal(after["lm_head.indices"], indices) and torch.equal(after["lm_head.scales"], scales)
    assert torch.equal(after["model.embed_tokens.weight"], embedding)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["layers"]["lm_head"]["grid"] == "ch8"
    assert {r.grid for r in report.layers if r.layer == "lm_head"} == {"ch8"}


def test_untied_head(sharded, tmp_path):
    quantize_checkpoint(sharded, tmp_path / "out", lm_head_grid="p2_n256")
    after = load(tmp_path / "out")
    assert "lm_head.indices" in after and "lm_head.weight" not in after and "model.embed_tokens.weight" in after


def test_bits_picks_the_uniform_grid(checkpoint, tmp_path):
    assert {r.grid for r in quantize_checkpoint(checkpoint, tmp_path / "a").layers} == {"p2_n256"}
    assert {r.grid for r in quantize_checkpoint(checkpoint, tmp_path / "b", bits=3).layers} == {"p4_n4096"}
    with pytest.raises(ValueError, match=r"no grid of 3.3 bits; use one of 1, 1.5, 2, 2.5"):
        quantize_checkpoint(checkpoint, tmp_path / "c", bits=3.3)
    with pytest.raises(ValueError, match="both given"):
        quantize_checkpoint(checkpoint, tmp_path / "c", bits=3, grid="p2_n64")
    assert not (tmp_path / "c").exists()


def test_same_input_same_bytes(sharded, tmp_path):
    for parent in ("a", "b"):
        quantize_checkpoint(sharded, tmp_path / parent / "out", energies=random_energies(sharded))
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")


def test_report_and_card(checkpoint, tmp_path):
    (checkpoint / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\nbase_model: some/one\n---\ntext\n")
    report = quantize_checkpoint(checkpoint, tmp_path / "out", grid="p2_n256", block=64)
    stored = json.loads((tmp_path / "out/higgs_report.json").read_text())
    assert Report.from_dict(stored).to_dict() == report.to_dict()
    assert stored["settings"]["block"] == "64"
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nbase_model: some/one\n") and "license: mit\nlanguage:\n- en\n" in card
    assert "library_name: transformers" in card and "pip install higgs-quant" in card and "import higgs" in card
    assert "higgs quantize source -o out --grid p2_n256 --block 64 --seed 0 --scales none" in card
    assert f"| p2_n256 | 14 | 0.2 M | {report.bits:.3f} | {report.t2:.6f} |" in card


def test_inspect(checkpoint, tmp_path):
    report = quantize_checkpoint(checkpoint, tmp_path / "out")
    found = inspect_checkpoint(tmp_path / "out")
    assert [(x.layer, x.grid, x.bits, x.bytes, x.t2) for x in found.layers] == [
        (r.layer, r.grid, r.bits, r.bytes, r.t2) for r in report.layers
    ]
    assert found.bits == report.bits and found.bytes == (tmp_path / "out/model.safetensors").stat().st_size
    plain = inspect_checkpoint(checkpoint)
    assert plain.bits is None and not plain.layers and plain.other["BF16"][0] == 20


# ---- which tensors are Linear


def test_unknown_architecture_is_guessed_by_names(tmp_path):
    names = ["blocks.0.attn.wq", "blocks.0.ffn.w1", "blocks.0.moe.router", "blocks.0.moe.gate", "tok_embeddings", "wte"]
    tensors = {f"{name}.weight": torch.randn(64, 64) for name in [*names, "lm_head"]}
    tensors |= {"blocks.0.norm.weight": torch.ones(64), "blocks.0.attn.wq.bias": torch.ones(64)}
    source = write_checkpoint(tmp_path / "source", tensors, {"model_type": "nobody_knows_it"})
    found = find_linear_weights(Checkpoint(source))
    assert set(found.layers.values()) == {"blocks.0.attn.wq", "blocks.0.ffn.w1"}
    assert "picked by the names" in found.notes[0]
    report = quantize_checkpoint(source, tmp_path / "out", lm_head_grid="ch8")
    assert [r.layer for r in report.layers] == ["blocks.0.attn.wq", "blocks.0.ffn.w1", "lm_head"]


def test_base_model_checkpoint_lacks_the_prefix(checkpoint, tmp_path):
    tensors = {name.removeprefix("model."): t for name, t in load(checkpoint).items()}
    source = write_checkpoint(tmp_path / "base", tensors, json.loads((checkpoint / "config.json").read_text()))
    found = find_linear_weights(Checkpoint(source))
    assert len(found.layers) == 14 and found.head_source == "embed_tokens.weight"
    assert found.layers["layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj"


def test_experts_are_put_together(tmp_path):
    h, f = 64, 128
    tensors = {"model.embed_tokens.weight": torch.randn(96, h), "model.norm.weight": torch.ones(h)}
    p = "model.layers.0"
    for name in "qkvo":
        tensors[f"{p}.self_attn.{name}_proj.weight"] = torch.randn(h, h)
    for e in range(2):
        for name, shape in (("w1", (f, h)), ("w2", (h, f)), ("w3", (f, h))):
            tensors[f"{p}.block_sparse_moe.experts.{e}.{name}.weight"] = torch.randn(*shape)
    tensors[f"{p}.block_sparse_moe.gate.weight"] = torch.randn(2, h)
    config = {"model_type": "mixtral", "hidden_size": h, "intermediate_size": f, "num_hidden_layers": 1, "head_dim": 32,
              "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1,
              "vocab_size": 96, "tie_word_embeddings": True}  # fmt: skip
    report = quantize_checkpoint(write_checkpoint(tmp_path / "source", tensors, config), tmp_path / "out")
    assert {r.layer.removeprefix(f"{p}."): (r.n, r.k) for r in report.layers} == {
        "block_sparse_moe.experts.down": (2 * h, f), "block_sparse_moe.experts.gate_up": (2 * 2 * f, h),
        **{f"self_attn.{name}_proj": (h, h) for name in "kqvo"},
    }  # fmt: skip
    assert not report.notes and not report.skipped
    del tensors[f"{p}.block_sparse_moe.experts.1.w2.weight"]  # not what the model needs: nothing is put together
    report = quantize_checkpoint(write_checkpoint(tmp_path / "broken", tensors, config), tmp_path / "left")
    assert len(report.layers) == 4 and any("5 matrices" in note for note in report.notes)


# ---- bad input


def test_k_not_divisible_by_64(tmp_path):
    source = make_checkpoint(tmp_path / "source", intermediate=172)
    report = quantize_checkpoint(source, tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    assert report.skipped[name] == "k = 172 is not a positive multiple of 64" and len(report.layers) == 12
    assert torch.equal(load(tmp_path / "out")[f"{name}.weight"], load(source)[f"{name}.weight"])
    with pytest.raises(ValueError, match=rf"{name} \[128, 172\].*k = 172"):
        quantize_checkpoint(source, tmp_path / "strict", strict=True)


def test_a_source_of_which_nothing_can_be_quantized_says_why(tmp_path):
    source = make_checkpoint(tmp_path / "source", dtype=torch.float64)
    with pytest.raises(ValueError, match="none of the 14 Linear layers can be quantized: dtype F64 is not one of"):
        quantize_checkpoint(source, tmp_path / "out", bits=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scaled", [False, True])
def test_nan_or_inf_names_the_tensor(checkpoint, tmp_path, value, scaled):
    tensors = load(checkpoint)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    energies = random_energies(checkpoint) if scaled else None
    with pytest.raises(ValueError, match=rf"{name}: .*\[3, 5\] is -?(nan|inf)"):
        quantize_checkpoint(checkpoint, tmp_path / "out", energies=energies)
    assert not list((tmp_path / "out").glob("*.tmp")) and not (tmp_path / "out/model.safetensors").exists()


def test_nan_energies_are_traced_to_a_tensor(checkpoint, tmp_path):
    energies = random_energies(checkpoint)
    energies.energies["model.layers.0.self_attn.o_proj"][0] = float("nan")
    with pytest.raises(ValueError, match=r"input energies of model.layers.0.self_attn.o_proj contain NaN or inf"):
        quantize_checkpoint(checkpoint, tmp_path / "out", energies=energies)
    tensors = load(checkpoint)
    tensors["model.embed_tokens.weight"][7, 1] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor model.embed_tokens.weight: weight \[7, 1\] is nan"):
        quantize_checkpoint(checkpoint, tmp_path / "out", energies=energies)


def test_truncated_safetensors(checkpoint, tmp_path):
    file = checkpoint / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    with pytest.raises(
        FormatError, match=rf"model.safetensors is truncated: .* byte {size}, the file has {size - 100}"
    ):
        quantize_checkpoint(checkpoint, tmp_path / "out")
    os.truncate(file, 100)
    with pytest.raises(FormatError, match="100 bytes, header of"):
        Checkpoint(checkpoint)
    os.truncate(file, 0)
    with pytest.raises(FormatError, match="0 bytes"):
        Checkpoint(checkpoint)


def test_trailing_bytes_and_bad_headers(checkpoint):
    file = checkpoint / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good + b"more")
    with pytest.raises(FormatError, match=rf"end at byte {len(good)}, the file has {len(good) + 4}"):
        Checkpoint(checkpoint)
    for header, message in (
        (b"not json", "not a JSON object"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"x": {"dtype": "F32"}}', "bad header entry of tensor x"),
        (b'{"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', "expected one of"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__ does not map names to strings"),
        (b'{"x": ' + b"[" * 100_000, "not a JSON object"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not a JSON object"),
        (b'{"x": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}', "dtype 'F33', expected one of"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "takes 8 bytes, its header gives it 4"),
        (b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "bad header entry"),
    ):
        file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
        with pytest.raises(FormatError, match=message):
            Checkpoint(checkpoint)


def test_missing_shard_and_wrong_index(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first = "model-00001-of-00004.safetensors"
    index["weight_map"]["no.such.weight"] = first
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=rf"says that {first} holds tensor no.such.weight"):
        Checkpoint(sharded)
    (sharded / first).unlink()
    with pytest.raises(FormatError, match=rf"{first} is missing: .* holds \d+ tensors"):
        Checkpoint(sharded)
    index["weight_map"] = {"x": "../../secret.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="plain file name"):
        Checkpoint(sharded)


def test_directories_that_are_no_model(checkpoint, tmp_path):
    with pytest.raises(OSError, match="only local model directories are read"):
        Checkpoint("meta-llama/Llama-2-7b")
    with pytest.raises(FormatError, match=r"config.json is missing"):
        Checkpoint(tmp_path)
    (checkpoint / "model.safetensors").rename(checkpoint / "weights.bin")
    with pytest.raises(UnsupportedError, match="convert them to safetensors"):
        Checkpoint(checkpoint)
    (checkpoint / "weights.bin").unlink()
    with pytest.raises(FormatError, match=r"neither model.safetensors nor"):
        Checkpoint(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config.json is not JSON"):
        Checkpoint(checkpoint)


def test_quantized_source_and_own_output(checkpoint, tmp_path):
    quantize_checkpoint(checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match=r"already quantized .*higgs_quant"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ValueError, match="source itself"):
        quantize_checkpoint(checkpoint, checkpoint)
    other = make_checkpoint(tmp_path / "other")
    with pytest.raises(ValueError, match="holds another model"):
        quantize_checkpoint(checkpoint, other, force=True)


def test_broken_quantized_checkpoints(checkpoint, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(checkpoint, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"is 99, this version of higgs reads 1"):
        inspect_checkpoint(out)
    config["quantization_config"]["format_version"] = 1
    config["quantization_config"]["layers"]["model.layers.0.mlp.up_proj"]["group"] = 64
    config["quantization_config"]["layers"]["model.layers.0.mlp.up_proj"]["block"] = 64
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"up_proj.scales is F16 \[192, 1\], expected F16 \[192, 2\]"):
        inspect_checkpoint(out)
    config["quantization_config"]["layers"] = {"nobody": {"grid": "p2_n64", "block": 64, "group": 64, "seed": 0}}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"nobody.indices is missing"):
        inspect_checkpoint(out)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_is_a_format_error(tmp_path_factory, data):
    directory = tmp_path_factory.getbasetemp()
    file = directory / "damaged.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.ones(7, dtype=torch.uint8)}, file)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        entries, _, _ = read_header(file)
    except FormatError as e:
        assert "damaged.safetensors" in str(e)
    else:
        assert sum(e.nbytes for e in entries) < len(raw)


def test_real_model(stories260k, tmp_path):
    report = quantize_checkpoint(stories260k, tmp_path / "out")
    assert len(report.layers) == 30 and len(report.skipped) == 5
    assert report.t2 == pytest.approx(0.00772, rel=0.05)
