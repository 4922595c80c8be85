"""LoRA adapters (PEFT) on a quantized model."""

from __future__ import annotations

from pathlib import Path

import higgs
import pytest
import torch
from conftest import run_python
from higgs import HiggsQuantConfig
from higgs.evaluate import read_text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parents[1] / "data"
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def model(stories260k: Path) -> PreTrainedModel:
    """Its down_proj are too narrow and stay Linear: adapters on both kinds."""
    return AutoModelForCausalLM.from_pretrained(stories260k, quantization_config=HiggsQuantConfig(bits=3))


@pytest.fixture
def ids(stories260k: Path) -> torch.Tensor:
    """Real text, four windows of 64 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    found = tokenizer(read_text(DATA / "tinystories-sample.txt"), return_tensors="pt").input_ids
    return found[:, :256].view(4, 64)


def adapted(model: PreTrainedModel, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **options}))


def train(tuned: torch.nn.Module, ids: torch.Tensor, steps: int) -> list[float]:
    """Loss before each step."""
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = tuned(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_falls_and_the_adapter_loads_again(
    model: PreTrainedModel, ids: torch.Tensor, dtype: torch.dtype, stories260k: Path, tmp_path: Path
) -> None:
    tuned = adapted(model.to(dtype))
    frozen = {name: p.clone() for name, p in tuned.named_parameters() if not p.requires_grad}
    trainable = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 5 and all("lora_" in name for name in trainable)
    losses = train(tuned, ids, 25)
    assert losses[-1] < losses[0] - 0.5, losses
    assert all(torch.equal(p, frozen[name]) for name, p in tuned.named_parameters() if name in frozen)

    tuned.eval()
    tuned.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(stories260k, quantization_config=HiggsQuantConfig(bits=3)).to(dtype)
    untuned = base(ids).logits
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(ids).logits, tuned(ids).logits)
    with loaded.disable_adapter():
        assert torch.equal(loaded(ids).logits, untuned)


def test_gradient_checkpointing_gives_the_same_gradients(model: PreTrainedModel, ids: torch.Tensor) -> None:
    tuned = adapted(model).train()

    def gradients() -> dict[str, torch.Tensor]:
        tuned.zero_grad()
        tuned(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}

    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)  # else the gradients of lora_A are zero
    expected = gradients()
    assert len(expected) == 2 * 7 * 5 and all(g.abs().max() > 0 for g in expected.values())
    for reentrant in (False, True):
        tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tuned.enable_input_require_grads()
        assert tuned.base_model.model.model.gradient_checkpointing
        found = gradients()
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-7) for name in expected)


@pytest.mark.parametrize("use_gradient_checkpointing", [True, False])
def test_prepare_model_for_kbit_training(
    model: PreTrainedModel, ids: torch.Tensor, use_gradient_checkpointing: bool
) -> None:
    """The scales stay as they are, norms and embeddings become float32, and the loss falls."""
    higgs.dequantize_(model)
    higgs.quantize_(model, bits=4, scales="random")
    model.to(torch.bfloat16)
    packed = {name: p.clone() for name, p in model.named_parameters() if name.endswith(("indices", "scales", "_scale"))}
    assert len(packed) == 3 * 6 * 5
    prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=use_gradient_checkpointing)
    assert prepared is model and model.model.gradient_checkpointing == use_gradient_checkpointing
    assert not hasattr(model, "is_loaded_in_4bit")
    for name, p in model.named_parameters():
        assert not p.requires_grad
        assert torch.equal(p, packed[name]) if name in packed else p.dtype == torch.float32
    tuned = adapted(model).train()
    losses = train(tuned, ids, 6)
    assert losses[-1] < losses[0] - 0.1, losses


def test_what_needs_the_weights_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(higgs.UnsupportedError, match="use_dora=True needs the weight"):
        adapted(model, use_dora=True)


def test_other_initializations_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(higgs.UnsupportedError, match="init_lora_weights='pissa' is not supported on HiggsLinear"):
        adapted(model, init_lora_weights="pissa")


def test_merging_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(higgs.UnsupportedError, match="cannot be merged into quantized weights"):
        adapted(model).merge_and_unload()


def test_registered_whichever_is_imported_first() -> None:
    check = "from peft.tuners.lora import model; assert model.dispatch_default.__module__.startswith('higgs')"
    check += "; assert all(m.prepare_model_for_kbit_training.__wrapped__ for m in (peft, peft.utils, peft.utils.other))"
    for imports in ("import higgs, peft", "import peft, higgs"):
        process = run_python(f"{imports}; {check}")
        assert process.wait() == 0, process.stderr
