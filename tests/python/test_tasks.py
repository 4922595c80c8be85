"""`higgs eval --tasks`: lm-eval on local files. Without lm-eval only its absence is tested; with it:

python -m venv .venv-eval && .venv-eval/bin/pip install -c python/constraints.txt ".[dev,eval]"
.venv-eval/bin/python -m pytest tests/python/test_tasks.py
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import higgs
import pytest
import torch
from conftest import DATA
from higgs.cli.app import app
from higgs.evaluate import load
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
PERPLEXITY = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch) -> Path:
    """A directory with tasks ``story_ppl`` and ``story_choice`` on real text; wrong endings are scrambled."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    stories = [s.strip() for s in (DATA / "tinystories-sample.txt").read_text().split("<|endoftext|>") if s.strip()]
    text = stories if len(stories) >= 8 else [s for s in "\n".join(stories).split("\n") if len(s) > 200][:8]
    choices = []
    for i, story in enumerate(text[:8]):
        words = story.split()[:40]
        right, wrong = " " + " ".join(words[20:]), " " + " ".join(reversed(words[20:]))
        choices.append({"text": " ".join(words[:20]), "choices": [right, wrong][:: 1 - 2 * (i % 2)], "answer": i % 2})
    path = tmp_path / "tasks"
    path.mkdir()
    for name, template, documents in (
        ("story_ppl", PERPLEXITY, [{"text": story[:400]} for story in text[:4]]),
        ("story_choice", CHOICE, choices),
    ):
        file = path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (path / f"{name}.yaml").write_text(template.format(name=name, file=file))
    return path


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["eval", *map(str, words), "--device", "cpu"])
    return result.exit_code, result.output


@needs_lm_eval
def test_perplexity_and_multiple_choice(stories260k: Path, tasks: Path, tmp_path: Path) -> None:
    model, tokenizer = load(stories260k)
    higgs.quantize_(model, bits=4, scales="none")
    model.save_pretrained(tmp_path / "q")
    tokenizer.save_pretrained(tmp_path / "q")
    code, out = run(tmp_path / "q", "--tasks", "story_ppl,story_choice", "--task-dir", tasks, "--json")
    assert code == 0, out
    results = json.loads(out[out.index("{") :])["tasks"]
    assert results["story_choice"]["acc,none"] >= 0.875

    nll = size = 0
    for line in (tasks / "story_ppl.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = tokenizer(text, return_tensors="pt").input_ids  # after which lm-eval puts BOS before any text
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
        nll += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        size += len(text.encode())
    assert results["story_ppl"]["byte_perplexity,none"] == pytest.approx(math.exp(nll / size), rel=2e-3)

    code, out = run(tmp_path / "q", "--tasks", "story_choice", "--task-dir", tasks, "--limit", 2, "--batch-size", 2)
    assert code == 0 and "story_choice acc 1.0000" in out, out


@needs_lm_eval
def test_unknown_tasks_are_named(stories260k: Path, tasks: Path) -> None:
    code, out = run(stories260k, "--tasks", "story_ppl,nonsense", "--task-dir", tasks)
    assert code != 0 and "tasks nonsense: lm-eval has no such tasks" in out, out


def test_nothing_to_measure(stories260k: Path) -> None:
    code, out = run(stories260k)
    assert code != 0 and "give --text FILE, --tasks NAME,... or both" in out


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval(stories260k: Path) -> None:
    code, out = run(stories260k, "--tasks", "hellaswag")
    assert code != 0 and "pip install 'higgs-quant[eval]'" in out
