"""Fixtures: tiny checkpoints made on the fly, no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from higgs.checkpoint import Checkpoint
from higgs.energies import Energies
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"

DATA = Path(__file__).parents[1] / "data"


def make_checkpoint(
    path: Path,
    *,
    shards: int = 1,
    tied: bool = True,
    hidden: int = 128,
    intermediate: int = 192,
    layers: int = 2,
    vocab: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """A Llama with random weights as a Hugging Face directory, its tensors dealt out to ``shards`` files in order."""
    generator = torch.Generator().manual_seed(seed)
    kv = hidden // 2

    def random(*shape: int) -> torch.Tensor:
        return (0.1 * torch.randn(*shape, generator=generator)).to(dtype)

    tensors = {"model.embed_tokens.weight": random(vocab, hidden), "model.norm.weight": torch.ones(hidden, dtype=dtype)}
    for i in range(layers):
        p = f"model.layers.{i}"
        for name, n, k in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ):
            tensors[f"{p}.{name}.weight"] = random(n, k)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{p}.{name}.weight"] = torch.ones(hidden, dtype=dtype)
    if not tied:
        tensors["lm_head.weight"] = random(vocab, hidden)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": hidden // 32,
        "num_key_value_heads": kv // 32, "head_dim": 32, "vocab_size": vocab, "max_position_embeddings": 512,
        "tie_word_embeddings": tied, "dtype": str(dtype).removeprefix("torch."), "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return write_checkpoint(path, tensors, config, shards=shards)


def write_checkpoint(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], *, shards: int = 1) -> Path:
    path.mkdir(parents=True)
    names = list(tensors)
    parts = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = "model.safetensors" if shards == 1 else f"model-{i:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, path / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text('{"do_sample": false}')
    (path / "LICENSE").write_text("as you like\n")
    return path


GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
          ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip


def run_python(code: str, *args: object, **kwargs) -> subprocess.Popen:
    """A child with this one's packages."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def torchrun(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``torchrun WORDS`` with two ranks."""
    code = "import runpy, sys; sys.argv[0] = 'torchrun'; runpy.run_module('torch.distributed.run', run_name='__main__')"
    child = run_python(code, "--standalone", "--nproc-per-node", 2, *words)
    out, err = child.communicate(timeout=200)
    return child.returncode, out, err


def load(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, by the safetensors library."""
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def contents(path: Path) -> dict[str, bytes]:
    """All files but the report, which holds timings."""
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != "higgs_report.json"}


def random_energies(path: Path, seed: int = 0) -> Energies:
    generator = torch.Generator().manual_seed(seed)
    tensors = Checkpoint(path).tensors
    layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
    shared = [[f"model.layers.{i}.{name}" for name in group] for i in range(layers) for group in GROUPS]
    energies = {}
    for group in shared:
        a = torch.rand(tensors[f"{group[0]}.weight"].shape[1], generator=generator) + 0.01
        energies.update(dict.fromkeys(group, a))
    return Energies(energies, shared, "random")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One file, tied embeddings, every Linear quantizable."""
    return make_checkpoint(tmp_path / "source")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Four files (layers of one input in different ones), head of its own."""
    return make_checkpoint(tmp_path / "source", shards=4, tied=False)


@pytest.fixture
def stories260k() -> Path:
    """A real Llama of 260 thousand parameters; its down_proj (k = 172) cannot be quantized."""
    path = DATA / "stories260K"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for each other, for long if the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_random(model: Any, path: Path) -> Path:
    """Saves a transformers model with random weights, biases and norms too, which start as zeros and ones."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else 0.05)
    model.save_pretrained(path)
    return path


def load_whole(path: Path, **kwargs: Any) -> Any:
    """The transformers model in ``path``. Nothing missing, nothing unexpected."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model
