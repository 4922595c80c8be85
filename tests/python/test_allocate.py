"""Allocation: published predictions, exact costs, ties, budgets, messages; `higgs plan`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction

import pytest
from conftest import DATA
from higgs import FormatError, layer_format
from higgs.allocate import Allocation, corrected, grid_menu, latency_costs, plan_allocation, stored_bits, tied_groups
from higgs.cli.tables import allocation_text
from higgs.sensitivity import LayerSensitivity, Sensitivities
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import run, run_json

LLAMA = DATA / "llama31_8b_sensitivity.json"

# Perplexities of the exact optimum (integer DP, index bits, no ties) that come with the published table.
MENU_A = "p2_n16,p2_n64,p2_n256"
MENU_B = MENU_A + ",p1_n256"
MENU_C = MENU_B + ",p2_n1024,p2_n4096"
MENU_D = MENU_C + ",p2_n32,p2_n128,p2_n512,p2_n2048"
PUBLISHED = {
    MENU_A: (7.4793, 6.5804, 6.3332, 6.1627, 5.9748),
    MENU_B: (7.4486, 6.5093, 6.2485, 6.0669, 5.8531),
    MENU_C: (7.4000, 6.4795, 6.2220, 6.0410, 5.8260),
    MENU_D: (7.3004, 6.4303, 6.1876, 6.0170, 5.8132),
}
CASES = [(menu, b, p) for menu, row in PUBLISHED.items() for b, p in zip((2.5, 3.0, 3.25, 3.5, 4.0), row, strict=True)]


@pytest.mark.parametrize(("menu", "bits", "perplexity"), CASES)
def test_predictions_for_llama(menu, bits, perplexity):
    words = ["--bits", bits, "--menu", menu, "--untie", "--index-bits", "--t2-from-file"]
    plan = run_json("plan", LLAMA, *words)
    assert plan["predicted_perplexity"] == pytest.approx(perplexity, abs=5e-5)
    assert plan["gap"] == 0 and plan["bits"] <= bits and len(plan["layers"]) == 224
    loss = sum(layer["alpha"] * layer["t2"] for layer in plan["layers"])
    assert plan["predicted_loss"] == pytest.approx(loss, rel=1e-12)


def model(*alphas: float, n: int = 128, k: int = 192) -> Sensitivities:
    """One attention and one MLP after the other."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    return Sensitivities(
        [LayerSensitivity(f"layers.{i // 7}.{kinds[i % 7]}", n, k, alpha) for i, alpha in enumerate(alphas)]
    )


def test_costs_are_those_of_the_format():
    for n, k in ((64, 64), (576, 576), (100, 8384), (1536, 576)):
        layer = LayerSensitivity("x", n, k, 1.0)
        for grid in grid_menu():
            for scale in (False, True):
                assert stored_bits(layer, grid.rate, scale) == 8 * layer_format(n, k, grid.name).stored_bytes(scale)


def test_groups():
    names = ["a.0.q_proj", "a.0.k_proj", "a.0.v_proj", "a.0.o_proj", "a.1.v_proj", "m.0.gate_proj", "m.0.up_proj",
             "m.1.up_proj", "head"]  # fmt: skip
    assert tied_groups(names) == [0, 0, 0, 1, 2, 3, 3, 4, 5]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=7, max_size=21), st.floats(1.3, 8.5), st.booleans())
def test_budget_and_ties_hold(alphas, bits, untie):
    sensitivities = model(*alphas)
    plan = plan_allocation(sensitivities, bits=bits, untie=untie)
    cost = sum(8 * layer_format(x.n, x.k, x.grid).stored_bytes(True) for x in plan.layers)
    weights = sum(x.n * x.k for x in plan.layers)
    assert plan.cost == cost <= Fraction(str(bits)) * weights and plan.gap == 0
    assert plan.bits == pytest.approx(cost / weights, rel=1e-12)
    if not untie:
        groups = tied_groups([x.name for x in plan.layers])
        assert len(set(zip(groups, plan.grids.values(), strict=True))) == len(set(groups))
        assert plan.predicted_loss >= plan_allocation(sensitivities, bits=bits, untie=True).predicted_loss - 1e-12


def test_the_sensitive_layer_gets_the_bits():
    plan = plan_allocation(model(0.01, 0.01, 0.01, 5.0, 0.01, 0.01, 0.01), bits=3.0)
    rates = {x.name: x.bits for x in plan.layers}
    assert max(rates, key=rates.__getitem__) == "layers.0.self_attn.o_proj"


def test_fixed_and_excluded_layers():
    sensitivities = model(*[0.1 * i for i in range(1, 15)])
    plan = plan_allocation(
        sensitivities, bits=6, fixed={r"\.v_proj": "p1_n256", "1.mlp.down": "p1_n4"}, skip=["layers.0.mlp"]
    )
    assert plan.grids["layers.1.mlp.down_proj"] == "p1_n4"
    assert {plan.grids[f"layers.{i}.self_attn.{x}_proj"] for i in (0, 1) for x in "qkv"} == {"p1_n256"}  # tied
    assert set(plan.skipped) == {f"layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")} and len(plan.grids) == 11
    untied = plan_allocation(sensitivities, bits=4, fixed={r"\.v_proj": "p1_n256"}, untie=True)
    assert untied.grids["layers.0.self_attn.q_proj"] != "p1_n256"
    with pytest.raises(ValueError, match=r"no layer matches 'nothing'"):
        plan_allocation(sensitivities, bits=4, fixed={"nothing": "p1_n4"})
    with pytest.raises(ValueError, match=r"'q_proj' are fixed to 'p3_n8', which is not in the menu"):
        plan_allocation(sensitivities, bits=4, fixed={"q_proj": "p3_n8"})
    with pytest.raises(ValueError, match=r"no layer is left"):
        plan_allocation(sensitivities, bits=4, skip=["."])


def test_other_budgets():
    sensitivities = model(*[0.1] * 7)
    by_bits = plan_allocation(sensitivities, bits=3.5)
    by_bytes = plan_allocation(sensitivities, size=by_bits.budget // 8)
    assert by_bytes.predicted_loss == pytest.approx(by_bits.predicted_loss)
    rows = [{"n": 128, "k": 192, "grid": g.name, "m": 1, "us": 1 + float(g.rate)} for g in grid_menu()]
    latencies = latency_costs([*rows, {"n": 128, "k": 192, "grid": "p1_n4", "m": 16, "us": 99}], 1)
    fast = plan_allocation(sensitivities, latency_us=7 * 4.5, latencies=latencies)
    assert fast.unit == "ns" and fast.cost <= fast.budget == 31500
    with pytest.raises(ValueError, match=r"budget of 6.0000 us .* out of reach; .* 21.0000 to 63.0000 us"):
        plan_allocation(sensitivities, latency_us=6, latencies=latencies)
    with pytest.raises(ValueError, match=r"no time for \d+ combinations, e.g. 128x192"):
        plan_allocation(sensitivities, latency_us=60, latencies=latency_costs(rows, 2))
    with pytest.raises(ValueError, match="exactly one budget"):
        plan_allocation(sensitivities, bits=3, size=5)
    with pytest.raises(ValueError, match="exactly one budget"):
        plan_allocation(sensitivities)


def test_budgets_out_of_reach_name_the_range():
    with pytest.raises(ValueError, match=r"1.1000 bits a weight .* this menu allows 1.\d{4} to 8.\d{4} bits a weight"):
        plan_allocation(model(*[0.1] * 7), bits=1.1)
    for bad in (0.0, -3.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="use a positive number"):
            plan_allocation(model(0.1), bits=bad)
    assert set(plan_allocation(model(0.1, 0.2), bits=100).grids.values()) == {"p1_n256"}


def test_negative_sensitivities_and_odd_layers():
    sensitivities = model(0.1, -0.2, 0.3)
    sensitivities.layers.append(LayerSensitivity("odd", 10, 172, 1.0))
    plan = plan_allocation(sensitivities, bits=4, untie=True)
    assert plan.skipped == {"odd": "k = 172 is not a multiple of 64"} and "1 negative" in plan.notes[0]
    assert plan.predicted_loss >= 0 and plan.layers[1].loss == 0


@pytest.mark.parametrize(("scaled", "factor"), [(True, 5), (False, 14)])
def test_low_rate_correction(scaled, factor):
    sensitivities = model(*[0.01 * 3**i for i in range(7)])
    sensitivities.base_perplexity = 10.0
    linear = plan_allocation(sensitivities, bits=3.1, untie=True, column_scales=scaled)
    careful = plan_allocation(sensitivities, bits=3.1, untie=True, column_scales=scaled, low_rate=True)
    assert (linear.objective, careful.objective) == ("linear", "corrected")
    for plan in (linear, careful):
        assert plan.predicted_loss == pytest.approx(sum(x.alpha * x.t2 for x in plan.layers))
        assert plan.corrected_loss == pytest.approx(sum(x.alpha * x.t2 * (1 + factor * x.t2) for x in plan.layers))
    assert linear.predicted_loss < careful.predicted_loss and linear.corrected_loss > careful.corrected_loss
    assert careful.predicted_perplexity == pytest.approx(10 * math.exp(careful.corrected_loss))
    assert max(x.t2 for x in careful.layers) <= max(x.t2 for x in linear.layers)


def test_low_rate_correction_meets_published_perplexities():
    """Llama-3.1-8B on one grid of pairs: 6.015 at 4 and 7.110 at 3.25 bits, which the linear model underrates."""
    sensitivities = Sensitivities.load(LLAMA)
    total = sum(sensitivities.alphas.values())
    for t2, published in ((0.00775, 6.015), (0.0212, 7.110)):  # 0.0212: of 90 points
        linear, low_rate = (5.607 * math.exp(total * x) for x in (t2, corrected(t2, False)))
        assert abs(low_rate - published) < 0.5 * abs(linear - published)


def test_grids_below_two_bits_are_for_budgets_that_need_them():
    sensitivities = model(*[0.01 * 3**i for i in range(7)])
    usual = [g for g in grid_menu() if g.rate >= 2]
    low = {g.name for g in grid_menu()} - {g.name for g in usual}
    least = plan_allocation(sensitivities, bits=8, menu=grid_menu(["p4_n256"])).bits
    for bits in (least, 2.5, 4):
        plan = plan_allocation(sensitivities, bits=bits)
        assert plan == plan_allocation(sensitivities, bits=bits, menu=usual) and plan.objective == "linear"
    plan = plan_allocation(sensitivities, bits=least - 0.01)
    assert set(plan.grids.values()) & low and plan.objective == "corrected"
    assert plan == plan_allocation(sensitivities, bits=least - 0.01, menu=grid_menu(), low_rate=True)
    fixed = plan_allocation(sensitivities, bits=4, fixed={"o_proj": "p4_n16"})
    assert fixed.grids["layers.0.self_attn.o_proj"] == "p4_n16"


def test_menu():
    assert [g.name for g in grid_menu(["p2_n64", "p1_n4", "p2_n64"])] == ["p2_n64", "p1_n4"]
    assert grid_menu(["tcq_2.5"], {"tcq_2.5": (2.5, 0.036)})[0].rate == Fraction(5, 2)
    assert [g.name for g in grid_menu(None, {"tcq_2.5": (2.5, 0.036), "p2_n64": (3, 0.03)})] == ["p2_n64"]
    with pytest.raises(ValueError, match=r"no grid 'p9_n9'; use p1_n4"):
        grid_menu(["p9_n9"])
    with pytest.raises(ValueError, match="empty"):
        grid_menu([])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"layers": []}, "no list of layers"),
        ({"format": "x", "layers": [1]}, "holds 'x' version None"),
        ({"version": 2, "layers": [1]}, "version 2"),
        ({"layers": [{"name": "a", "alpha": 1}]}, r"malformed layer .*shape"),
        ({"layers": [{"name": "a", "alpha": float("nan"), "shape": [1, 64]}]}, "alpha is not a finite number"),
        ({"layers": [{"name": "a", "alpha": 1, "shape": [1, 64], "first_order": float("inf")}]}, "first_order is not"),
        ({"layers": [{"name": "a", "alpha": 1, "shape": [0, 64]}]}, "two positive integers"),
        ({"layers": [{"name": "a", "alpha": 1, "shape": [1, 64]}] * 2}, "a twice"),
        ({"layers": [{"name": "a", "alpha": 1, "shape": [1, 64]}], "measured_t2": {"p": 1}}, "measured_t2"),
        ({"layers": [{"name": "a", "alpha": 1, "shape": [1, 64]}], "relative_error": "x"}, "relative error"),
    ],
)
def test_broken_sensitivities(data, message):
    with pytest.raises(FormatError, match=message):
        Sensitivities.from_dict(data)


def test_first_order_is_in_predictions_and_in_no_choice():
    layers = [LayerSensitivity(f"{i}", 64, 64 * (i + 1), 2.0**i, first_order=-0.1 * i) for i in range(4)]
    without = Sensitivities([replace(x, first_order=0.0) for x in layers], 7.5, relative_error=0.25)
    for low_rate in (False, True):
        plain = plan_allocation(without, bits=3.6, low_rate=low_rate)
        plan = plan_allocation(Sensitivities(layers, 7.5, relative_error=0.25), bits=3.6, low_rate=low_rate)
        assert plan.grids == plain.grids and len(set(plan.grids.values())) > 1 and plain.first_order == 0
        assert plan.first_order == pytest.approx(sum(-0.1 * i * x.t2 for i, x in enumerate(plan.layers)))
        assert plan.predicted_loss == pytest.approx(plain.predicted_loss + plan.first_order)
        assert plan.corrected_loss == pytest.approx(plain.corrected_loss + plan.first_order)
        assert plan.predicted_perplexity == pytest.approx(plain.predicted_perplexity * math.exp(plan.first_order))
        assert plan.predicted_error == plain.predicted_error
    assert "first_order" not in json.dumps(without.to_dict())
    assert "of first order" in allocation_text(plan) and "of first order" not in allocation_text(plain)


def test_files_survive_a_round_trip(tmp_path):
    sensitivities = Sensitivities(
        [LayerSensitivity("a.q_proj", 64, 64, 0.5, False, 0.01, -0.125)],
        7.5,
        {"p1_n4": (2, 0.1)},
        {"method": "fisher"},
        0.25,
    )
    sensitivities.save(tmp_path / "s.json")
    assert Sensitivities.load(tmp_path / "s.json") == sensitivities
    plan = plan_allocation(sensitivities, bits=3.5)
    assert plan.predicted_error == 0.25 * plan.layers[0].loss > 0
    plan.save(tmp_path / "p.json")
    assert Allocation.load(tmp_path / "p.json") == plan
    for wrong in ({"layers": [{"name": "x"}]}, {**plan.to_dict(), "notes": 5}, {**plan.to_dict(), "gap": None}):
        (tmp_path / "p.json").write_text(json.dumps(wrong))
        with pytest.raises(FormatError, match="is no plan"):
            Allocation.load(tmp_path / "p.json")


def test_plan_command(tmp_path):
    plan = run_json("plan", LLAMA, "--bits", 3.25, "-o", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == plan
    text = run("plan", LLAMA, "--bits", 3.25).stdout
    assert "model.layers.1.mlp.down_proj" in text and "(the optimum)" in text and "perplexity 6.19" in text
    refused = run("plan", LLAMA, "--bits", 1)
    assert refused.exit_code == 1 and "this menu allows 1.01" in refused.stderr
    assert "form REGEX=GRID" in run("plan", LLAMA, "--bits", 3, "--fix", "x").stderr
    assert "no sensitivities file" in run("plan", tmp_path / "none.json", "--bits", 3).stderr
    table = tmp_path / "latencies.jsonl"
    table.write_text('{"n": 1}\n')
    assert "a line lacks" in run("plan", LLAMA, "--latency-us", 3, "--latencies", table).stderr
    fixed = run_json("plan", LLAMA, "--bits", 3.25, "--fix", "down_proj=p2_n256", "--skip", r"layers\.0\.")
    assert {x["grid"] for x in fixed["layers"] if "down_proj" in x["name"]} == {"p2_n256"}
    assert len(fixed["layers"]) == 217
