"""`higgs report`: the pictures and the page."""

from __future__ import annotations

import math
import re

import higgs
import pytest
import torch
from conftest import DATA
from higgs import evaluate
from higgs.checkpoint import inspect_checkpoint
from higgs.sensitivity import LayerSensitivity, Sensitivities
from test_cli import run, run_json


def mirror_luck(quantized, original, perplexity: float) -> float:
    """Half of what the loss of the report's windows changes when the rounding errors change sign."""
    (model, tokenizer), base = evaluate.load(quantized), evaluate.load_model(original)
    model.dequantize()
    for name, p in model.named_parameters():
        if "proj" in name:
            error = p.detach() - base.get_parameter(name)
            p.data = base.get_parameter(name).detach() - error
    ids = evaluate.token_windows(tokenizer, (DATA / "tinystories-sample.txt").read_text(), 128, 2)
    return 0.5 * math.log(perplexity / evaluate.score(model, ids)["perplexity"])


def test_mirror_image_errs_the_other_way(stories260k, tmp_path):
    run_json("quantize", stories260k, "-o", tmp_path / "q", "--bits", 3, "--scales", "none", "--lm-head-grid", "p2_n64")
    model, base = evaluate.load_model(tmp_path / "q"), evaluate.load_model(stories260k)
    quantized = higgs.dequantize_(evaluate.load_model(tmp_path / "q"))
    evaluate.mirror_(model, base)
    for name, p in model.named_parameters():
        original, other = base.get_parameter(name), quantized.get_parameter(name)
        assert torch.allclose(p + other, 2 * original, rtol=0, atol=1e-6)
        changed = ("proj" in name and "down" not in name) or name == "lm_head.weight"
        assert torch.equal(p, original) != changed


def test_report(stories260k, tmp_path):
    outs = [tmp_path / "three", tmp_path / "<four>"]
    for out, bits in zip(outs, (3, 4), strict=True):
        run_json("quantize", stories260k, "-o", out, "--bits", bits, "--scales", "none")
    layers = [LayerSensitivity(x.layer, x.n, x.k, 0.5, first_order=-0.125) for x in inspect_checkpoint(outs[0]).layers]
    Sensitivities(layers).save(tmp_path / "s.json")
    words = ["--sensitivities", tmp_path / "s.json", "--text", DATA / "tinystories-sample.txt", "--base", stories260k,
             "--context", 128, "--windows", 2]  # fmt: skip
    result = run_json("report", *outs, "-o", tmp_path / "r", *words)
    names = {path.rpartition("/")[2] for path in result["output"]}
    pictures = {"bits.png", "kinds.png", "t2.png", "loss.png", "pareto.png", "linearity.png"}
    assert names == pictures | {"report.html"}
    assert all((tmp_path / "r" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    page = (tmp_path / "r/report.html").read_text()
    assert page.count("<img") == 6 and "<td>&lt;four&gt;</td>" in page and "<four>" not in page
    cells = re.findall(r"<td>(.*?)</td>", page)
    report = inspect_checkpoint(outs[0])
    assert cells[1] == f"{report.bits:.3f}" and cells[3] == f"{result['perplexity']['three']:.3f}"
    first_order = -0.125 * sum(x.t2 for x in report.layers)
    assert float(cells[4]) == round(-3 * first_order, 4) and float(cells[5]) == round(first_order, 4)
    luck = mirror_luck(outs[0], stories260k, result["perplexity"]["three"])
    assert float(cells[7]) == pytest.approx(luck - first_order, abs=2e-4) and abs(luck - first_order) > 1e-3
    assert result["perplexity"]["three"] > result["perplexity"]["<four>"] > result["base_perplexity"]


def test_report_without_measurements(stories260k, tmp_path):
    run_json("quantize", stories260k, "-o", tmp_path / "q", "--bits", 3, "--scales", "none")
    assert run("report", tmp_path / "q", "-o", tmp_path / "r").stdout == f"{tmp_path / 'r' / 'report.html'}\n"
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["bits.png", "kinds.png", "report.html", "t2.png"]
    refused = run("report", stories260k, "-o", tmp_path / "r")
    assert refused.exit_code == 1 and "higgs_report.json is missing" in refused.stderr
