"""Sensitivities: the noise, both methods, jobs that survive a kill, several ranks, mixed checkpoints."""

from __future__ import annotations

import json
import math
import re
import shutil
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, load, make_checkpoint, random_energies, torchrun
from higgs import UnsupportedError, evaluate, jobs, plan_allocation
from higgs.checkpoint import Checkpoint, inspect_checkpoint
from higgs.checkpoint.layers import build_meta_model
from higgs.checkpoint.measure import _TOKENS, MeasureOptions, measure_checkpoint, sample_tokens
from higgs.energies import SELF_CONTEXT, linear_layers, random_tokens, self_tokens
from higgs.evaluate import load_model
from higgs.measure import Fisher, Noise, Target, _draw_labels, find_targets, fit_line, jointly_perturbed, perturbed
from higgs.progress import NullProgress
from higgs.sensitivity import LayerSensitivity, Sensitivities
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import run, run_json
from torch import nn
from transformers import OPTConfig, OPTForCausalLM


def random_layer(n: int, k: int, seed: int = 0, scaled: bool = True) -> Target:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(k, n, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator))
    scale = (2 * torch.rand(k, generator=generator) + 0.1).half() if scaled else None
    return Target(linear, 128, scale)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.sampled_from([64, 128, 192, 320]), st.booleans(), st.integers(0, 99))
def test_noise_has_the_energy_of_each_scale_group(n, k, scaled, seed):
    target = random_layer(n, k, seed, scaled)
    s = target.column_scale.float() if scaled else torch.ones(k)
    weight, std = target.linear.weight.detach() * s, target.noise_std() * s
    for first in range(0, k, 128):
        group = slice(first, first + 128)
        assert torch.allclose(std[:, group].square().sum(1), weight[:, group].square().sum(1), rtol=1e-4)
        assert torch.allclose(std[:, group], std[:, first : first + 1].expand_as(std[:, group]), rtol=1e-4)


def test_perturbing_a_layer_and_restoring_its_bits():
    target = random_layer(300, 256)
    weight = target.linear.weight
    before = weight.detach().clone()
    with perturbed(target, 0.04, seed=1):
        error = (weight.detach() - before) * target.column_scale.float()
        assert error.square().sum() / (before * target.column_scale.float()).square().sum() == pytest.approx(
            0.04, rel=0.03
        )
        first = weight.detach().clone()
    assert torch.equal(weight, before)
    with perturbed(target, 0.04, seed=1):
        assert torch.equal(weight, first)
    with pytest.raises(KeyboardInterrupt), perturbed(target, 0.04, seed=1):
        raise KeyboardInterrupt
    assert torch.equal(weight, before)


def test_fit_line():
    assert fit_line([0.01, 0.02], [0.03, 0.06]) == (pytest.approx(3.0), pytest.approx(0.0, abs=1e-12))
    slope, residual = fit_line([1.0, 2.0], [1.0, 1.0])
    assert slope == pytest.approx(0.6) and residual == pytest.approx((0.4**2 + 0.2**2) ** 0.5 / 2**0.5)
    assert fit_line([0.1], [0.0]) == (0.0, 0.0)


class Bigram(nn.Module):
    """Predicts each token from the one before: its Fisher information can be written down."""

    def __init__(self, vocabulary: int = 12, width: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, width)
        self.layer = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, vocabulary, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 8)

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.out(torch.tanh(self.layer(self.embedding(ids)))) * 8)


def exact_alpha(model: Bigram, target: Target, ids: torch.Tensor) -> float:
    """1/2 sum sigma^2 F with every label y of every position, weighted by its probability."""
    total = 0.0
    for token in ids[:, :-1].flatten():
        log_p = model(token[None, None]).logits[0, 0].log_softmax(-1)
        for y in range(len(log_p)):
            (g,) = torch.autograd.grad(log_p[y], target.linear.weight, retain_graph=True)
            total += 0.5 * log_p[y].exp().item() * (g * target.noise_std()).square().sum().item()
    return total / ids[:, :-1].numel()


def test_fisher_is_the_expectation_over_labels():
    model = Bigram()
    ids = random_tokens(12, 40, 8)
    target = Target(model.layer, 64, None)
    flags = [p.requires_grad for p in model.parameters()]
    runs = [Fisher(model, {"layer": target}, ids, seed=seed).run("batch 0") for seed in range(300)]
    estimates = [run["alphas"]["layer"] for run in runs]
    mean = sum(estimates) / len(estimates)
    spread = (sum((e - mean) ** 2 for e in estimates) / len(estimates)) ** 0.5
    assert mean == pytest.approx(exact_alpha(model, target, ids), abs=4 * spread / len(estimates) ** 0.5)
    assert spread < mean
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())


def test_labels_follow_their_distribution():
    probabilities = torch.tensor([0.0, 0.5, 0.125, 0.375, 0.0])
    rows = probabilities.log().expand(4096, 5)
    labels = _draw_labels(rows, torch.Generator().manual_seed(0))
    shares = labels.flatten().bincount(minlength=5) / 4096
    assert labels.shape == (4096, 1) and torch.allclose(shares, probabilities, atol=0.025)
    assert shares[0] == shares[4] == 0
    assert torch.equal(labels, _draw_labels(rows, torch.Generator().manual_seed(0)))


def test_noise_in_all_layers_gives_the_sum():
    """A third way to the same number: noise in all layers at once."""
    model = Bigram()
    ids = random_tokens(12, 64, 8)
    targets = {"layer": Target(model.layer, 64, None), "out": Target(model.out, 64, None)}
    runs = [Fisher(model, targets, ids, seed=seed).run("batch 0") for seed in range(100)]
    exact = sum(exact_alpha(model, target, ids) for target in targets.values())
    assert sum(run["sum"] for run in runs) / 100 == pytest.approx(exact, rel=0.08)


def test_joint_noise_is_in_every_layer_and_leaves_no_trace():
    model = Bigram()
    ids = random_tokens(12, 64, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    targets = {"layer": Target(model.layer, 64, None), "out": Target(model.out, 64, None)}

    @torch.no_grad()
    def logits(*names: str) -> torch.Tensor:
        with jointly_perturbed(model, {name: targets[name] for name in names}, 0.01, seed=3):
            return model(ids).logits

    both = logits("layer", "out")
    assert torch.equal(both, logits("layer", "out"))
    assert not torch.allclose(both, logits("layer"), atol=1e-3) and not torch.allclose(both, logits("out"), atol=1e-3)
    with pytest.raises(RuntimeError), jointly_perturbed(model, targets, 0.01, seed=3):
        model.layer(torch.zeros(1, 3))
    assert torch.equal(model(ids).logits, logits())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_first_order_is_the_gradient_of_the_text_along_the_weights():
    ids = random_tokens(12, 1024 + 4 * 64, 64)  # batches of 1024 and 256 tokens
    model = Bigram()
    targets = {"layer": Target(model.layer, 64, None), "out": Target(model.out, 64, random_layer(12, 64).column_scale)}
    log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean()
    weights = [target.linear.weight for target in targets.values()]
    exact = [(g * w).sum().item() for g, w in zip(torch.autograd.grad(log_p, weights), weights, strict=True)]
    fisher, plain = Fisher(model, targets, ids, is_text=True), Fisher(model, targets, ids)
    results = {job: fisher.run(job) for job in fisher.jobs()}
    assert list(fisher.first_order(results).values()) == pytest.approx(exact, rel=1e-4) and min(map(abs, exact)) > 1e-3
    assert all(p.grad is None for p in model.parameters())
    expected = {job: plain.run(job) for job in plain.jobs()}  # the same alphas, and no first order without a text
    assert results == {job: {**r, "first_order": results[job]["first_order"]} for job, r in expected.items()}
    assert plain.first_order(expected) == {}


def test_alphas_get_the_sum_of_the_joint_noise():
    ids = random_tokens(12, 2 * 1024 + 4 * 64, 64)  # batches of 1024, 1024 and 256 tokens
    model = Bigram()
    fisher = Fisher(model, {"layer": Target(model.layer, 64, None), "out": Target(model.out, 64, None)}, ids)
    results = {
        "batch 0": {"alphas": {"layer": 1.0, "out": 3.0}, "sum": 5.0},
        "batch 1": {"alphas": {"layer": 2.0, "out": 2.0}, "sum": 7.0},
        "batch 2": {"alphas": {"layer": 3.0}, "sum": 6.0},
    }
    alphas = {name: alpha for name, (alpha, _) in fisher.fit(results).items()}
    assert sum(alphas.values()) == pytest.approx((4 * 5 + 4 * 7 + 6) / 9)
    assert alphas["layer"] / alphas["out"] == pytest.approx((4 * 1 + 4 * 2 + 3) / (4 * 3 + 4 * 2))
    assert fisher.relative_error(results) == pytest.approx(math.sqrt(2 * (4 / 9) ** 2 * 1.5) / 6)
    assert Fisher(model, fisher._targets, ids[:2]).relative_error({"batch 0": results["batch 0"]}) is None


def test_gradients_that_are_not_finite_are_refused():
    model = Bigram()
    with torch.no_grad():
        model.out.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match="the gradient of layer layer is not finite on the tokens of batch 0"):
        Fisher(model, {"layer": Target(model.layer, 64, None)}, random_tokens(12, 64, 8)).run("batch 0")


def test_small_noise_agrees_with_fisher():
    """Two independent ways to the same number: perturbing, and differentiating."""
    model = Bigram()
    ids = random_tokens(12, 64, 8)
    targets = {"layer": Target(model.layer, 64, None), "out": Target(model.out, 64, None)}
    fisher = {name: exact_alpha(model, target, ids) for name, target in targets.items()}
    for name in targets:
        runs = [Noise(model, targets, ids, levels=[1e-3], seed=seed) for seed in range(40)]
        mean = sum(noise.run(f"{name} 0.001") for noise in runs) / len(runs) / 1e-3
        assert mean == pytest.approx(fisher[name], rel=0.15)


def test_methods_rank_the_layers_of_a_real_model_alike(stories260k):
    model = evaluate.load(stories260k)[0]
    ids = random_tokens(512, 512, 64)
    targets, skipped = find_targets(model, {})
    assert len(skipped) == 5 and all("172" in reason for reason in skipped.values())
    fisher = Fisher(model, targets, ids)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    a = fisher.fit({job: fisher.run(job) for job in fisher.jobs()})
    runs = [
        Noise(model, targets, ids, levels=[0.01], seed=seed) for seed in range(4)
    ]  # one draw of noise is few numbers
    b = {name: [sum(noise.run(f"{name} 0.01") for noise in runs) / 0.03] for name in targets}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    x, y = (torch.tensor([v[name][0] for name in targets]) for v in (a, b))
    ranks = torch.stack([x.argsort().argsort(), y.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.8
    assert 0.5 < x.sum() / y.sum() < 2


def test_noise_objectives():
    model = Bigram()
    ids = random_tokens(12, 64, 8)
    targets = {"layer": Target(model.layer, 64, None)}
    assert Noise(model, targets, ids, objective="kl").run("layer 0.01") > 0
    loss = Noise(model, targets, ids, objective="loss").run("layer 0.01")
    log_p = [model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean()]
    noise = Noise(model, targets, ids, objective="loss")
    with perturbed(targets["layer"], 0.01, noise._noise_seed("layer 0.01")):
        log_p.append(model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean())
    assert loss == pytest.approx((log_p[0] - log_p[1]).item(), abs=1e-6)
    with pytest.raises(ValueError, match="objective 'x'"):
        Noise(model, targets, ids, objective="x")
    for levels in ([], [0.0], [2.0]):
        with pytest.raises(ValueError, match="in \\(0, 1\\]"):
            Noise(model, targets, ids, levels=levels)


def test_head_of_its_own(stories260k):
    model = evaluate.load(stories260k)[0]
    targets, _ = find_targets(model, {}, lm_head=True)
    assert "lm_head" in targets and "lm_head" not in find_targets(model, {})[0]
    with perturbed(targets["lm_head"], 0.1, 0):
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    with pytest.raises(UnsupportedError, match="no Linear layer"):
        find_targets(nn.Sequential(nn.Linear(30, 30)), {})


def test_jobs_are_done_once(tmp_path):
    done = []

    def work(job):
        done.append(job)
        if job == "c" and len(done) == 3:
            raise KeyboardInterrupt
        return {"value": job}

    with pytest.raises(KeyboardInterrupt):
        jobs.run_jobs(jobs.Team(), list("abcd"), work, tmp_path, NullProgress())
    file = tmp_path / "rank0.jsonl"
    file.write_text(file.read_text() + '{"job": "c", "resu')  # killed while writing
    assert jobs.run_jobs(jobs.Team(), list("abcd"), work, tmp_path, NullProgress()) == {j: {"value": j} for j in "abcd"}
    assert done == list("abccd")
    jobs.run_jobs(jobs.Team(), list("abcd"), work, tmp_path, NullProgress())
    assert len(done) == 5


SMALL = {"tokens": 128, "context": 32, "text": "random", "scales": "random"}


def test_measuring_resumes_and_guards_its_settings(tmp_path, monkeypatch):
    source, out = make_checkpoint(tmp_path / "source", layers=1), tmp_path / "s.json"
    options = MeasureOptions(method="noise", levels=(0.01, 0.02), **SMALL)
    runs = []
    original = Noise.run

    def counted(self, job):
        if len(runs) == 5:
            runs.append("killed")
            raise KeyboardInterrupt
        runs.append(job)
        return original(self, job)

    monkeypatch.setattr(Noise, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_checkpoint(source, out, options)
    with pytest.raises(ValueError, match=r"(?s)was begun with other settings.*method: noise -> fisher"):
        measure_checkpoint(source, out, MeasureOptions(**SMALL))
    found = measure_checkpoint(source, out, options)
    assert len(runs) == 15 and len(set(runs)) == 15  # 7 layers, 2 levels, each once
    assert len(found.layers) == 7 and all(x.alpha > 0 and x.residual < 0.5 for x in found.layers)
    assert not (tmp_path / "s.json.work").exists() and Sensitivities.load(out) == found
    assert measure_checkpoint(source, out, options) == found and len(runs) == 15
    with pytest.raises(ValueError, match=r"(?s)was made with other settings.*seed: 0 -> 1"):
        measure_checkpoint(source, out, MeasureOptions(method="noise", levels=(0.01, 0.02), seed=1, **SMALL))
    assert measure_checkpoint(source, out, MeasureOptions(**SMALL), force=True).about["method"] == "fisher"


@pytest.mark.parametrize(("method", "text"), [("fisher", DATA / "tinystories-sample.txt"), ("noise", "random")])
def test_two_ranks_agree_with_one(tmp_path, stories260k, method, text):
    source = make_checkpoint(tmp_path / "source", layers=1) if text == "random" else stories260k
    words = ["measure", source, "--method", method, "--text", text, "--tokens", 2048, "--context", 64]
    words += ["--levels", "0.01", "--scales", "random"]
    run_json(*words, "-o", tmp_path / "one.json")
    code, out, err = torchrun("-m", "higgs.cli", *words, "-o", tmp_path / "two.json", "--json")
    assert code == 0, err
    assert json.loads(out)["method"] == method  # printed once
    one, two = Sensitivities.load(tmp_path / "one.json"), Sensitivities.load(tmp_path / "two.json")
    assert two.alphas == pytest.approx(one.alphas, rel=1e-3)
    first_order = {x.name: x.first_order for x in one.layers}
    assert {x.name: x.first_order for x in two.layers} == pytest.approx(first_order, rel=1e-3)
    assert any(first_order.values()) == (text != "random")


# `higgs` that logs the jobs that ranks begin. With LOG.kill there, rank 1 kills itself in its third job, which rank 0
# waits for after two of its own.
LOGGED = """
import os, pathlib, signal, sys, time
from higgs import cli, jobs, measure
log, rank, begun, original = pathlib.Path(sys.argv.pop(1)), jobs.rank(), [], measure.Noise.run
def run(self, job):
    begun.append(job)
    with log.open("a") as f:
        f.write(job + "\\n")
    if len(begun) == 3 and pathlib.Path(f"{log}.kill").exists():
        if rank == 1:
            pathlib.Path(f"{log}.killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while not pathlib.Path(f"{log}.killed").exists():
            time.sleep(0.01)
    return original(self, job)
measure.Noise.run = run
cli.main()
"""


def test_killing_a_rank_loses_at_most_the_jobs_at_hand(tmp_path, one_thread):
    """torchrun ends the other rank too when one dies. Ranks have one thread each: the same bits as this process."""
    source, log = make_checkpoint(tmp_path / "source", layers=1), tmp_path / "log"
    (tmp_path / "logged.py").write_text(LOGGED)
    words = ["measure", source, "--method", "noise", "--text", "random", "--tokens", 512, "--context", 64]
    words += ["--levels", "0.01,0.02,0.03,0.04"]

    def measure() -> tuple[int, str, list[str]]:
        """Exit code, messages, jobs begun by both ranks."""
        log.write_text("")
        code, _, err = torchrun(tmp_path / "logged.py", log, *words, "-o", tmp_path / "two.json")
        return code, err, log.read_text().splitlines()

    (tmp_path / "log.kill").touch()
    code, err, begun = measure()
    finished = jobs.finished_jobs(tmp_path / "two.json.work")
    assert code != 0 and "SIGKILL" in err and not (tmp_path / "two.json").exists()
    assert len(begun) == len(set(begun)) >= 5 and len(begun) - 2 <= len(finished) < len(begun)  # one a rank is lost
    (tmp_path / "log.kill").unlink()
    code, err, again = measure()
    assert code == 0, err
    assert len(again) == len(set(again)) == 28 - len(finished) and not set(again) & set(finished)
    run_json(*words, "-o", tmp_path / "one.json")
    assert Sensitivities.load(tmp_path / "two.json").alphas == Sensitivities.load(tmp_path / "one.json").alphas


def test_text_and_loss(stories260k, tmp_path):
    words = ["measure", stories260k, "--text", DATA / "tinystories-sample.txt", "--tokens", 256, "--context", 64]
    found = run_json(*words, "-o", tmp_path / "s.json", "--method", "noise", "--objective", "loss", "--levels", "0.1")
    assert len(found["layers"]) == 30 and sum(x["alpha"] for x in found["layers"]) > 0
    assert set(found["skipped"]) == {f"model.layers.{i}.mlp.down_proj" for i in range(5)}
    fisher = run(*words, "-o", tmp_path / "f.json")
    assert "model.layers.4.mlp.up_proj" in fisher.stdout and "first order on the text" in fisher.stdout
    assert not any("first_order" in x for x in found["layers"])
    assert re.search(r"30 layers, sum of sensitivities \d+\.\d+ nats,", fisher.stdout)  # one batch: no error
    words[words.index(256)] = 4096
    several = run(*words, "-o", tmp_path / "several.json").stdout
    total, error = map(float, re.search(r"sum of sensitivities (\S+) ± (\S+) nats", several).groups())
    found = Sensitivities.load(tmp_path / "several.json")
    assert total == pytest.approx(sum(found.alphas.values()), abs=1e-4) and 0 < error < 0.5 * total
    planned = run("plan", tmp_path / "several.json", "--bits", 4.1)
    numbers = re.search(r"predicted loss increase (\S+) ± (\S+) .*, of it (\S+) of first order", planned.stdout)
    loss, error, first_order = map(float, numbers.groups())
    assert error == pytest.approx((loss - first_order) * found.relative_error, abs=2e-6) and error > 0 != first_order


@pytest.mark.parametrize("text", ["self", "random", DATA / "tinystories-sample.txt"])
def test_windows_are_no_longer_than_the_model_has_positions(stories260k, tmp_path, text):
    """OPT's positions are a table: a token beyond it is an error."""
    source, out = tmp_path / "source", tmp_path / "s.json"
    config = OPTConfig(
        vocab_size=512, hidden_size=64, ffn_dim=128, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=64, max_position_embeddings=128,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories260k / name, source)
    found = run_json("measure", source, "--text", text, "--tokens", 2048, "-o", out)
    assert len(found["layers"]) == 6 and found["relative_error"] > 0
    options = MeasureOptions(text=str(text), tokens=2048)
    assert sample_tokens(load_model(source), source, options, NullProgress()).shape == (16, 128)


def test_sampled_text_is_short_pieces_joined(stories260k):
    """The pieces are those of the column scales, where there are any, and as many as it takes."""
    model = load_model(stories260k)

    def sample(tokens: int, context: int, sampled: torch.Tensor | None = None) -> torch.Tensor:
        options = MeasureOptions(tokens=tokens, context=context)
        return sample_tokens(model, stories260k, options, NullProgress(), sampled)

    assert torch.equal(sample(512, 512), self_tokens(model, 512, SELF_CONTEXT).view(1, 512))
    assert torch.equal(sample(640, 320), self_tokens(model, 768, SELF_CONTEXT).flatten()[:640].view(2, 320))
    assert torch.equal(sample(100, 50), self_tokens(model, 100, 50))
    known = random_tokens(512, 1024, 128)
    assert torch.equal(sample(1024, 512, known), known.view(2, 512))
    assert torch.equal(sample(700, 300, known), known.flatten()[:600].view(2, 300))
    assert torch.equal(sample(60, 30, known[:0]), sample(60, 30))
    for text in ("self", "random", str(DATA / "tinystories-sample.txt")):
        with pytest.raises(ValueError, match="tokens 40 must be at least context 64"):
            sample_tokens(model, stories260k, MeasureOptions(text=text, tokens=40, context=64), NullProgress())


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="method 'x'"):
        MeasureOptions(method="x")
    with pytest.raises(ValueError, match="needs method 'noise' and a text"):
        MeasureOptions(objective="loss")
    with pytest.raises(ValueError, match="context 1 is not supported"):
        MeasureOptions(context=1)
    with pytest.raises(ValueError, match=r"levels \[0.0\] are not supported"):
        MeasureOptions(levels=(0.0,))
    assert "separated by commas" in run("measure", tmp_path, "-o", tmp_path / "x", "--levels", "a").stderr


def test_every_rank_needs_a_device_of_its_own(checkpoint, tmp_path, monkeypatch):
    count = torch.cuda.device_count()
    monkeypatch.setenv("LOCAL_RANK", str(count))
    refused = run("measure", checkpoint, "-o", tmp_path / "s.json", "--device", "cuda")
    assert refused.exit_code == 1 and f"by process {count} of this machine: torch finds {count}" in refused.stderr
    with pytest.raises(ValueError, match="'cuda:1' is not supported; use cpu or cuda"):
        measure_checkpoint(checkpoint, tmp_path / "s.json", device="cuda:1")


def bytes_of(out, names) -> int:
    tensors = load(out)
    parts = ("indices", "scales", "column_scale")
    return sum(tensors[f"{n}.{p}"].nbytes for n in names for p in parts if f"{n}.{p}" in tensors)


def check_mixed(report, out, bits) -> dict[str, str]:
    """The grids of a checkpoint that uses its budget, counted on the bytes in the file, and respects ties."""
    grids = {x["layer"]: x["grid"] for x in report["layers"]}
    weights = sum(x["n"] * x["k"] for x in report["layers"])
    assert len(set(grids.values())) > 1 and len(grids) == 14
    assert 8 * bytes_of(out, grids) <= Fraction(str(bits)) * weights
    assert bits - 0.5 < report["bits"] <= bits
    for i in range(2):
        assert len({grids[f"model.layers.{i}.self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert len({grids[f"model.layers.{i}.mlp.{x}_proj"] for x in ("gate", "up")}) == 1
    assert {x.layer: x.grid for x in inspect_checkpoint(out).layers} == grids
    assert any("predicted loss increase" in note for note in report["notes"])
    return grids


def test_measured_allocated_and_quantized_in_one_call(tmp_path, monkeypatch):
    monkeypatch.setitem(_TOKENS, "fisher", 512)
    source, out = make_checkpoint(tmp_path / "source"), tmp_path / "out"
    check_mixed(run_json("quantize", source, "-o", out, "--bits", 3.25), out, 3.25)
    assert not (out / ".higgs").exists()
    assert "already complete" in run_json("quantize", source, "-o", out, "--bits", 3.25)["notes"][-1]
    refused = run("quantize", source, "-o", out, "--bits", 3.3)
    assert refused.exit_code == 1 and "grid: --bits 3.25 -> --bits 3.3" in refused.stderr


def test_any_float_is_a_budget(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    layers = linear_layers(build_meta_model(Checkpoint(source)))
    alphas = torch.rand(len(layers), generator=torch.Generator().manual_seed(0)).tolist()
    Sensitivities(
        [
            LayerSensitivity(name, *m.weight.shape, alpha)
            for (name, m), alpha in zip(layers.items(), alphas, strict=True)
        ]
    ).save(tmp_path / "s.json")
    energies = random_energies(source)
    energies.save(tmp_path / "e.safetensors")
    for bits in (1.5, 2.51, 3.0, 3.25, 4.7777, 6.1, 8.0):
        words = ["--bits", bits, "--sensitivities", tmp_path / "s.json", "--scales", tmp_path / "e.safetensors"]
        out = tmp_path / str(bits)
        check_mixed(run_json("quantize", source, "-o", out, *words), out, bits)
    refused = run("quantize", source, "-o", tmp_path / "x", *words[2:], "--bits", 1.1)
    assert refused.exit_code == 1 and "this menu allows 1.2" in refused.stderr


def test_mixed_checkpoint_runs_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    source, out = make_checkpoint(tmp_path / "source", dtype=torch.float32), tmp_path / "out"
    run_json("measure", source, "-o", tmp_path / "s.json", "--text", "random", "--tokens", 128, "--context", 32,
             "--lm-head")  # fmt: skip
    words = ["--bits", 4.2, "--sensitivities", tmp_path / "s.json"]
    report = run_json("quantize", source, "-o", out, *words, "--menu", "p2_n64,p2_n256,p1_n256")
    assert {x["layer"] for x in report["layers"]} >= {"lm_head", "model.layers.1.mlp.down_proj"}
    assert 8 * bytes_of(out, [x["layer"] for x in report["layers"]]) <= 4.2 * sum(
        x["n"] * x["k"] for x in report["layers"]
    )
    command = (out / "README.md").read_text()
    assert "--bits 4.2 --menu p2_n64,p2_n256,p1_n256 --sensitivities s.json --seed 0" in command
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = random_tokens(256, 64, 32)
    expected = AutoModelForCausalLM.from_pretrained(out).dequantize()(ids).logits
    assert torch.allclose(model(ids).logits, expected, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    assert {x.layer: x.grid for x in inspect_checkpoint(tmp_path / "again").layers} == {
        x.layer: x.grid for x in inspect_checkpoint(out).layers
    }


def test_quantize_corrects_for_low_rates(checkpoint, tmp_path):
    """Unlike `plan`, and unless told not to."""
    linears = linear_layers(build_meta_model(Checkpoint(checkpoint)))
    layers = [LayerSensitivity(n, m.out_features, m.in_features, 1.3**i) for i, (n, m) in enumerate(linears.items())]
    Sensitivities(layers).save(tmp_path / "s.json")

    def grids(*words: object) -> dict[str, str]:
        options = ["--bits", 3.2, "--sensitivities", tmp_path / "s.json", "--scales", "none", "--force", *words]
        report = run_json("quantize", checkpoint, "-o", tmp_path / "out", *options)
        return {x["layer"]: x["grid"] for x in report["layers"]}

    def planned(**options: bool) -> dict[str, str]:
        return plan_allocation(Sensitivities(layers), bits=3.2, column_scales=False, **options).grids

    assert grids() == grids("--low-rate") == planned(low_rate=True) != planned()
    assert grids("--no-low-rate") == planned()


def test_a_plan_is_replayed(checkpoint, tmp_path):
    names = [f"model.layers.{i}.{m}_proj" for i in range(2) for m in ("self_attn.o", "mlp.down")]
    shapes = {"o": (128, 128), "down": (128, 192)}
    layers = [LayerSensitivity(n, *shapes[n.split(".")[-1][:-5]], 0.1) for n in names]
    Sensitivities(layers).save(tmp_path / "s.json")
    plan = run_json("plan", tmp_path / "s.json", "--bits", 4.4, "-o", tmp_path / "plan.json")
    words = ["quantize", checkpoint, "-o", tmp_path / "out", "--scales", "none"]
    report = run_json(*words, "--plan", tmp_path / "plan.json")
    assert {x["layer"]: x["grid"] for x in report["layers"]} == {x["name"]: x["grid"] for x in plan["layers"]}
    assert report["skipped"]["model.layers.0.self_attn.q_proj"] == "not in the allocation"
    assert "--plan decides all grids" in run(*words, "--plan", tmp_path / "plan.json", "--bits", 3).stderr
    assert "need --bits" in run(*words, "--sensitivities", tmp_path / "s.json").stderr
    layers.append(LayerSensitivity("model.nothing", 64, 64, 0.1))
    Sensitivities(layers).save(tmp_path / "s.json")
    refused = run(*words, "--bits", 4.4, "--sensitivities", tmp_path / "s.json", "--force")
    assert refused.exit_code == 1 and "names 'model.nothing'" in refused.stderr
