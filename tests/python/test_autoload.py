"""What an installed wheel does in `import torch`: transformers knows what higgs adds without `import higgs`."""

from __future__ import annotations

import re
from pathlib import Path

import higgs
import higgs.checkpoint
import pytest
from conftest import load_whole, make_checkpoint, run_python

ROOT = Path(__file__).parents[2]
KNOWN = """
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import AttentionInterface
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
found = {"higgs_quant" in AUTO_QUANTIZER_MAPPING, "higgs_sdpa" in AttentionInterface()}
print(found.pop() if len(found) == 1 else "one of two")
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch) -> Path:
    """A directory that looks like the metadata of the wheel, with the entry points of pyproject.toml."""
    metadata = tmp_path / "higgs_quant-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: higgs-quant\nVersion: 0\n")
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'\[project.entry-points."torch.backends"\]\n(\w+) = "([\w.:]+)"', text)
    assert found
    (metadata / "entry_points.txt").write_text(f"[torch.backends]\n{found[1]} = {found[2]}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(code: str, monkeypatch, **environment: str) -> tuple[str, str]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process = run_python(code)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out.strip(), err


@pytest.mark.parametrize("first", ["torch", "transformers.quantizers", "higgs"])
def test_registered_whatever_is_imported_first(first: str, installed: Path, monkeypatch) -> None:
    pytest.importorskip(first.split(".")[0])
    assert run(f"import {first}\n{KNOWN}", monkeypatch)[0] == "True"


@pytest.mark.parametrize("streamed", [True, False])
def test_without_higgs_no_checkpoint_gets_random_weights(streamed: bool, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("transformers")
    path = make_checkpoint(tmp_path / "source")
    if streamed:
        higgs.checkpoint.quantize_checkpoint(path, tmp_path / "q", lm_head_grid="ch8")
    else:
        load_whole(path, quantization_config=higgs.HiggsQuantConfig(bits=4)).save_pretrained(tmp_path / "q")
    monkeypatch.setenv("HIGGS_AUTOLOAD", "0")
    load = "from transformers import AutoModelForCausalLM as M; M.from_pretrained({!r})"
    process = run_python(load.format(str(tmp_path / "q")))
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0 and "ignore_mismatched_sizes" in err and "mlp.down_proj.weight" in err
    assert "Unknown quantization type, got higgs_quant" in err
    load_whole(tmp_path / "q")  # with higgs: nothing missing, nothing unexpected


def test_opt_out(installed: Path, monkeypatch) -> None:
    assert run(f"import torch\n{KNOWN}", monkeypatch, HIGGS_AUTOLOAD="0")[0] == "False"


def test_import_torch_is_light_and_survives_a_broken_higgs(installed: Path, monkeypatch) -> None:
    light = "import torch, sys; print(any(n.split('.')[0] in ('higgs', 'transformers') for n in sys.modules))"
    assert run(light, monkeypatch)[0] == "False"
    broken = installed / "higgs"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('no such library')\n")
    out, err = run(f"import torch, sys\nsys.path.insert(0, {str(installed)!r})\n{KNOWN}", monkeypatch)
    assert out == "False" and "higgs is not registered with transformers: OSError('no such library')" in err
