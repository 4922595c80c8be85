"""The command line: options, JSON, messages, exit codes."""

from __future__ import annotations

import json
import re
import shutil
from importlib import metadata
from pathlib import Path

import higgs
import higgs.checkpoint
import pytest
import torch
from conftest import DATA, load, make_checkpoint, run_python, write_checkpoint
from higgs import UnsupportedError, demo
from higgs.cli.app import app
from higgs.cli.output import LineProgress, to_json
from higgs.energies import Energies
from higgs.seeds import layer_seeds
from typer.testing import CliRunner


def run(*words: object):
    """Result of `higgs WORDS`; fails on an exception that is neither a message nor an exit code."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_json(*words: object):
    """The one JSON document that `higgs WORDS --json` prints."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def fake_energies(monkeypatch):
    """Stands in for a forward pass; records how it was called."""
    calls = []

    def energies_for(model_dir, scales, *, tokens, seed, device, progress):
        calls.append((scales, tokens, seed))
        k = {"down_proj": 192}
        names = [
            f"model.layers.{i}.{part}"
            for i in range(2)
            for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
        ]
        inputs = {name: torch.linspace(1, 2, k.get(name.rsplit(".", 1)[1], 128)) for name in names}
        return Energies(inputs, [[name] for name in names], "random")

    monkeypatch.setattr("higgs.energies.energies_for", energies_for, raising=False)
    return calls


def test_version_and_help():
    assert run("--version").stdout == f"higgs {higgs.__version__}\n"
    listing = run("--help").stdout
    for command in (
        "quantize",
        "energies",
        "measure",
        "plan",
        "report",
        "eval",
        "generate",
        "inspect",
        "doctor",
        "demo",
    ):
        assert command in listing
        assert "--json" in run(command, "--help").stdout


def test_quantize_and_inspect_json(checkpoint, tmp_path):
    out = tmp_path / "out"
    report = run_json("quantize", checkpoint, "-o", out, "--bits", 3, "--scales", "none")
    assert report["output"] == str(out) and len(report["layers"]) == 14 and report["skipped"] == {}
    assert report["layers"][0]["grid"] == "p4_n4096" and 0.02 < report["t2"] < 0.04
    found = run_json("inspect", out)
    assert found["bits"] == report["bits"] and found["format_version"] == 1
    assert [x["bytes"] for x in found["layers"]] == [x["bytes"] for x in report["layers"]]
    assert run_json("inspect", checkpoint)["bits"] is None


def test_plain_output(checkpoint, tmp_path):
    out = tmp_path / "out"
    result = run("quantize", checkpoint, "-o", out, "--grid", "p1_n16", "--scales", "none", "--lm-head-grid", "ch8")
    assert result.exit_code == 0
    assert "quantizing: done in" in result.stderr and "quantizing" not in result.stdout
    assert "15 layers, " in result.stdout and f"{out}: done in" in result.stdout
    text = run("inspect", out).stdout
    assert "lm_head" in text and "ch8" in text and "p1_n16" in text and "as they are: 6 tensors BF16" in text
    assert "not quantized" in run("inspect", checkpoint).stdout
    again = run("quantize", checkpoint, "-o", out, "--grid", "p1_n16", "--scales", "none", "--lm-head-grid", "ch8")
    assert again.exit_code == 0 and "already complete" in again.stdout


def test_options_reach_the_checkpoint(checkpoint, tmp_path):
    words = ["--grid", "p2_n16", "--block", 64, "--group", 128, "--seed", 5, "--scales", "none", "--device", "cpu"]
    run_json("quantize", checkpoint, "-o", tmp_path / "out", *words)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    name = "model.layers.0.self_attn.q_proj"
    seed = layer_seeds(5, [name])[name]
    assert config["layers"][name] == {
        "grid": "p2_n16", "block": 64, "group": 128, "seed": seed, "column_scale": False,
    }  # fmt: skip


def test_scales_default_to_sampled_text(checkpoint, tmp_path, fake_energies):
    report = run_json("quantize", checkpoint, "-o", tmp_path / "out", "--seed", 3, "--scale-tokens", 1024)
    assert fake_energies == [("self", 1024, 3)]
    scaled = {x["layer"].rsplit(".", 1)[1] for x in report["layers"] if x["column_scale"]}
    assert scaled == {"q_proj", "o_proj", "up_proj", "down_proj"}
    assert any("for want of input energies" in note for note in report["notes"])
    card = (tmp_path / "out/README.md").read_text()
    assert "--seed 3 --scales self --scale-tokens 1024 --scale-exponent 0.25" in card
    run_json("quantize", checkpoint, "-o", tmp_path / "out", "--seed", 3, "--scale-tokens", 1024)
    assert len(fake_energies) == 1  # complete: no forward pass


def test_scales_from_a_text_and_from_a_file(checkpoint, tmp_path, fake_energies):
    text = tmp_path / "some text.txt"
    text.write_text("Once upon a time")
    run_json("quantize", checkpoint, "-o", tmp_path / "a", "--scales", text)
    assert fake_energies[0][0] == str(text)
    assert "--scales 'some text.txt' --scale-tokens 8192" in (tmp_path / "a/README.md").read_text()

    saved = tmp_path / "e.safetensors"
    made = run_json("energies", checkpoint, "-o", saved, "--tokens", 512)
    assert made == {"output": str(saved), "layers": 8, "inputs": 8, "source": "random"}
    assert fake_energies[1] == ("self", 512, 0)
    run_json("energies", checkpoint, "-o", saved, "--text", "random")
    assert fake_energies.pop() == ("random", 8192, 0)
    run_json("quantize", checkpoint, "-o", tmp_path / "b", "--scales", saved)
    assert len(fake_energies) == 2
    assert "--scales e.safetensors --scale-exponent" in (tmp_path / "b/README.md").read_text()


def test_model_that_cannot_be_run(checkpoint, tmp_path, monkeypatch):
    def energies_for(*args, **kwargs):
        raise UnsupportedError("it has no tokenizer")

    monkeypatch.setattr("higgs.energies.energies_for", energies_for, raising=False)
    result = run("quantize", checkpoint, "-o", tmp_path / "a")
    assert result.exit_code == 0 and "no column scales: it has no tokenizer" in result.stdout
    assert "--scales none" in (tmp_path / "a/README.md").read_text()
    result = run("quantize", checkpoint, "-o", tmp_path / "b", "--scales", "random")
    assert result.exit_code == 1 and result.stderr.endswith("error: it has no tokenizer\n")


def test_nan_in_a_weight_is_named_with_the_default_scales(tmp_path):
    """The model that is run for them gives NaN, and must not stop in the middle."""
    tensors = load(make_checkpoint(tmp_path / "good"))
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = float("nan")
    config = json.loads((tmp_path / "good/config.json").read_text())
    source = write_checkpoint(tmp_path / "source", tensors, config)
    result = run("quantize", source, "-o", tmp_path / "out")
    message = r"tensor model.layers.1.self_attn.v_proj.weight: weight \[3, 5\] is nan"
    assert result.exit_code == 1 and re.search(message, result.stderr)


def test_strict(tmp_path):
    source = make_checkpoint(tmp_path / "source", intermediate=172)
    assert len(run_json("quantize", source, "-o", tmp_path / "a", "--scales", "none")["skipped"]) == 2
    result = run("quantize", source, "-o", tmp_path / "b", "--scales", "none", "--strict")
    assert result.exit_code == 1 and "mlp.down_proj [128, 172] cannot be quantized: k = 172" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "p3_n7"], "p3_n7"),
        (["--bits", "0.9"], "0.9 bits a weight are less than the lowest rate of the menu, 1"),
        (["--bits", "4", "--grid", "p2_n256"], "both given"),
        (["--block", "96"], "block"),
        (["--block", "0"], "block 0 is not supported"),
        (["--bits", "nan"], "bits nan is not supported"),
        (["--bits", "3.3", "--fix", "(=p2_n256"], "fix '(' is no regular expression"),
        (["--seed", "-1"], "seed -1"),
        (["--scales", "nothing.txt"], "nothing.txt is not a file"),
        (["--scales", "nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_errors_are_one_message(checkpoint, tmp_path, words, message):
    scales = [] if "--scales" in words else ["--scales", "none"]
    result = run("quantize", checkpoint, "-o", tmp_path / "out", *words, *scales, "--json")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_changed_setting_and_force(checkpoint, tmp_path):
    out = tmp_path / "out"
    run_json("quantize", checkpoint, "-o", out, "--bits", 4, "--scales", "none")
    result = run("quantize", checkpoint, "-o", out, "--bits", 3, "--scales", "none")
    assert result.exit_code == 1 and "  grid: p2_n256 -> p4_n4096\n" in result.stderr
    assert run_json("quantize", checkpoint, "-o", out, "--bits", 3, "--scales", "none", "--force")["bits"] < 3.3


@pytest.mark.parametrize("command", ["quantize", "energies", "eval", "generate", "inspect"])
def test_models_are_local_directories(command, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("x")
    options = {
        "quantize": ["-o", "x"],
        "energies": ["-o", "x"],
        "eval": ["--text", text],
        "generate": ["--prompt", "x"],
    }
    result = run(command, "meta-llama/Llama-2-7b", *options.get(command, []))
    assert result.exit_code == 1
    assert "meta-llama/Llama-2-7b is not a directory; only local model directories are read" in result.stderr


def test_usage_errors_exit_with_2(checkpoint):
    assert run("quantize", checkpoint).exit_code == 2
    assert run("quantize", checkpoint, "-o", "x", "--device", "tpu").exit_code == 2
    assert run("quantize", checkpoint, "-o", "x", "--scale-exponent", "0.6").exit_code == 2
    assert run("no-such-command").exit_code == 2


def test_ctrl_c(checkpoint, tmp_path, monkeypatch):
    def interrupt(*args, progress, **kwargs):
        progress.start("quantizing", 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(higgs.checkpoint, "quantize_checkpoint", interrupt)
    result = run("quantize", checkpoint, "-o", tmp_path / "out", "--scales", "none")
    assert result.exit_code == 130 and result.stderr == "quantizing ...\ninterrupted\n"


def test_doctor():
    facts = run_json("doctor")
    assert facts["higgs"] == higgs.__version__ and facts["instruction_set"] in facts["instruction_sets"]
    assert {g["name"] for g in facts["grids"]} == {g.name for g in higgs.grids()}
    assert facts["packages"]["torch"] == metadata.version("torch") and facts["threads"] >= 1
    assert isinstance(facts["cuda_kernels"], bool) and isinstance(facts["cuda"]["available"], bool)
    text = run("doctor").stdout
    assert "instruction sets:" in text and "registered with transformers:" in text and "p2_n256" in text


def test_eval_and_generate(stories260k, tmp_path):
    words = ["eval", stories260k, "--text", DATA / "tinystories-sample.txt", "--context", 128, "--windows", 2]
    result = run_json(*words, "--base", stories260k)
    assert set(result) == {"perplexity", "tokens_per_s", "bits", "kl", "windows", "context"}
    assert result["kl"] == 0.0 and result["bits"] == 32.0 and 4 < result["perplexity"] < 12
    assert "KL 0.00000 (2 windows of 128)" in run(*words, "--base", stories260k).stdout
    binary, other = tmp_path / "binary", make_checkpoint(tmp_path / "other", vocab=600)
    binary.write_bytes(b"\xff" * 100)
    assert f"{binary} is no text in UTF-8" in run("eval", stories260k, "--text", binary).stderr
    assert "base has 600 tokens, the model 512" in run(*words, "--base", other).stderr
    assert run_json(*words, "--bos")["perplexity"] > 1.1 * result["perplexity"]  # after BOS it expects a beginning
    words = ["generate", stories260k, "--prompt", "Once upon a time", "--max-new-tokens", 12]
    assert run_json(*words)["text"] == run(*words).stdout.rstrip("\n")
    assert run(*words).stdout.startswith("Once upon a time, there was a little girl named Lily")


def test_quantized_real_model(stories260k, tmp_path):
    """The main job on a real model, small: quantize, then measure against the original."""
    run_json("quantize", stories260k, "-o", tmp_path / "q", "--bits", 8)
    words = ["--text", DATA / "tinystories-sample.txt", "--context", 256, "--windows", 4, "--base", stories260k]
    result = run_json("eval", tmp_path / "q", *words)
    assert (
        result["kl"] < 1e-3
        and abs(result["perplexity"] / run_json("eval", stories260k, *words)["perplexity"] - 1) < 0.01
    )


def test_demo(stories260k, tmp_path, monkeypatch):
    """All of it but the download, on a random model with a real tokenizer."""
    source = make_checkpoint(tmp_path / "source", vocab=512, dtype=torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories260k / name, source)
    monkeypatch.setattr(demo, "get_model", lambda work_dir, progress: source)
    monkeypatch.setattr(demo, "CONTEXT", 64)
    result = run_json("demo", "--work-dir", tmp_path / "demo", "--windows", 2)
    methods = [row["method"] for row in result["rows"]]
    assert len(methods) == 11 and "higgs p4_n4096" in methods and "NF4, groups of 64" in methods
    assert all(row["perplexity"] > 1 and row["megabytes"] > 0 for row in result["rows"])
    assert Path(result["plot"]).read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in run("demo", "--work-dir", tmp_path / "demo", "--windows", 2).stdout  # reuses what is there


def test_a_process_of_its_own(checkpoint, tmp_path):
    words = ["quantize", checkpoint, "-o", tmp_path / "out", "--scales", "none", "--json"]
    child = run_python("from higgs.cli import main; main()", *words)
    stdout, stderr = child.communicate(timeout=50)
    assert child.returncode == 0 and len(json.loads(stdout)["layers"]) == 14 and stderr == ""


def test_line_progress(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines: list[str] = []
    progress = LineProgress(lines.append, seconds=10)
    progress.start("work", 100)
    for _ in range(25):
        now[0] += 1
        progress.advance()
    progress.finish()
    progress.finish()
    assert lines == [
        "work ...",
        "work: 10 %, 10 s, 90 s left",
        "work: 20 %, 20 s, 80 s left",
        "work: done in 25.0 s",
    ]


def test_json_has_no_nan():
    assert json.loads(to_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": Path("x")})) == {
        "a": None, "b": [None, 1.5], "c": "x"
    }  # fmt: skip
