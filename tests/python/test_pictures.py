"""`higgs report`: the pictures and the page."""

from __future__ import annotations

import re

from conftest import DATA
from higgs.checkpoint import inspect_checkpoint
from higgs.sensitivity import LayerSensitivity, Sensitivities
from test_cli import run, run_json


def test_report(stories260k, tmp_path):
    outs = [tmp_path / "three", tmp_path / "<four>"]
    for out, bits in zip(outs, (3, 4), strict=True):
        run_json("quantize", stories260k, "-o", out, "--bits", bits, "--scales", "none")
    layers = [LayerSensitivity(x.layer, x.n, x.k, 0.5) for x in inspect_checkpoint(outs[0]).layers]
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
    assert float(cells[4]) == round(0.5 * sum(x.t2 for x in report.layers), 4)
    assert result["perplexity"]["three"] > result["perplexity"]["<four>"] > result["base_perplexity"]


def test_report_without_measurements(stories260k, tmp_path):
    run_json("quantize", stories260k, "-o", tmp_path / "q", "--bits", 3, "--scales", "none")
    assert run("report", tmp_path / "q", "-o", tmp_path / "r").stdout == f"{tmp_path / 'r' / 'report.html'}\n"
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["bits.png", "kinds.png", "report.html", "t2.png"]
    refused = run("report", stories260k, "-o", tmp_path / "r")
    assert refused.exit_code == 1 and "higgs_report.json is missing" in refused.stderr
