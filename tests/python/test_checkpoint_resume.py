"""Streaming a checkpoint: interruption, changed settings, full disks, memory."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import contents, random_energies, run_python, write_checkpoint
from higgs import FormatError, UnsupportedError
from higgs.checkpoint import inspect_checkpoint, quantize_checkpoint
from higgs.checkpoint.files import read_header
from higgs.energies import Energies
from higgs.progress import NullProgress


class Counting(NullProgress):
    total = 0.0

    def start(self, description: str, total: float | None = None) -> None:
        self.total = total or 0.0


SLOW_RUN = """
import sys, time
from higgs.checkpoint import quantize_checkpoint
from higgs.progress import NullProgress

class Slow(NullProgress):
    def advance(self, n=1):
        time.sleep(0.25)

quantize_checkpoint(sys.argv[1], sys.argv[2], grid="p2_n64", progress=Slow())
"""


def killed_run(source: Path, out: Path) -> None:
    """Begins to quantize and is killed (SIGKILL) when the first shard is there."""
    child = run_python(SLOW_RUN, source, out)
    deadline = time.monotonic() + 50
    while not (out / ".higgs/shard-model-00001-of-00004.safetensors.json").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()


def test_kill_then_resume_gives_the_same_bytes(sharded, tmp_path):
    out = tmp_path / "killed/out"
    killed_run(sharded, out)
    assert not (out / "config.json").exists() and not (out / "model-00004-of-00004.safetensors").exists()
    first = (out / "model-00001-of-00004.safetensors").stat().st_mtime_ns

    with pytest.raises(ValueError, match=r"grid: p2_n64 -> p2_n256\n  seed: 0 -> 1") as refused:
        quantize_checkpoint(sharded, out, grid="p2_n256", seed=1)
    assert "begun with other settings" in str(refused.value) and "block" not in str(refused.value)

    progress = Counting()
    report = quantize_checkpoint(sharded, out, grid="p2_n64", progress=progress)
    assert 0 < progress.total < sum(r.n * r.k for r in report.layers)
    assert (out / "model-00001-of-00004.safetensors").stat().st_mtime_ns == first
    whole = quantize_checkpoint(sharded, tmp_path / "whole/out", grid="p2_n64")
    assert contents(out) == contents(tmp_path / "whole/out")
    assert [(r.layer, r.t2) for r in report.layers] == [(r.layer, r.t2) for r in whole.layers]


def interrupted(source: Path, out: Path, after: int, **kwargs) -> None:
    """Begins to quantize and stops by KeyboardInterrupt after some layers."""

    class Interrupting(NullProgress):
        count = 0

        def advance(self, n: float = 1) -> None:
            self.count += 1
            if self.count == after:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, progress=Interrupting(), **kwargs)


def test_changed_setting_on_resume(sharded, tmp_path):
    out = tmp_path / "out"
    interrupted(sharded, out, 6, grid="p2_n64")
    assert (out / ".higgs").exists() and not list(out.glob("*.tmp"))
    with pytest.raises(FormatError, match="unfinished output"):
        inspect_checkpoint(out)
    with pytest.raises(ValueError, match=r"Changed:\n  block: default -> 64$"):
        quantize_checkpoint(sharded, out, grid="p2_n64", block=64)
    os.utime(sharded / "model-00002-of-00004.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match=r"source model-00002-of-00004.safetensors: .* changed 1,"):
        quantize_checkpoint(sharded, out, grid="p2_n64")
    quantize_checkpoint(sharded, out, grid="p2_n16", force=True)
    quantize_checkpoint(sharded, tmp_path / "b/out", grid="p2_n16")
    assert contents(out) == contents(tmp_path / "b/out")


def test_finished_output_is_left_alone(checkpoint, tmp_path):
    out = tmp_path / "out"
    first = quantize_checkpoint(checkpoint, out)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    again = quantize_checkpoint(checkpoint, out)
    assert "already complete" in again.notes[-1] and again.layers == first.layers
    assert before == {p: p.stat().st_mtime_ns for p in out.iterdir()}
    with pytest.raises(ValueError, match=r"made with other settings(.|\n)*grid: p2_n256 -> p4_n4096"):
        quantize_checkpoint(checkpoint, out, bits=3)
    quantize_checkpoint(checkpoint, out, bits=3, force=True)
    assert {x.grid for x in inspect_checkpoint(out).layers} == {"p4_n4096"}
    (out / "model.safetensors").unlink()
    quantize_checkpoint(checkpoint, out, bits=3)
    assert {x.grid for x in inspect_checkpoint(out).layers} == {"p4_n4096"}


def test_energies_are_gathered_once(sharded, tmp_path):
    calls = []

    def gather() -> Energies:
        calls.append(1)
        return random_energies(sharded, seed=len(calls))  # other bits each time, as on another machine

    interrupted(sharded, tmp_path / "a/out", 6, energies=gather, scales="random tokens=8")
    quantize_checkpoint(sharded, tmp_path / "a/out", energies=gather, scales="random tokens=8")
    assert len(calls) == 1
    quantize_checkpoint(sharded, tmp_path / "a/out", energies=gather, scales="random tokens=8")  # complete
    assert len(calls) == 1
    quantize_checkpoint(
        sharded, tmp_path / "b/out", energies=lambda: random_energies(sharded, seed=1), scales="random tokens=8"
    )
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")


def test_model_that_cannot_be_run(checkpoint, tmp_path):
    def gather() -> Energies:
        raise UnsupportedError("too large for this machine")

    with pytest.raises(UnsupportedError, match="too large"):
        quantize_checkpoint(checkpoint, tmp_path / "a", energies=gather, scales="random")
    report = quantize_checkpoint(checkpoint, tmp_path / "b", energies=gather, scales="random", scales_optional=True)
    assert report.notes == ["no column scales: too large for this machine"]
    assert not any(r.column_scale for r in report.layers)


def test_two_writers(checkpoint, tmp_path):
    class Second(NullProgress):
        def start(self, description: str, total: float | None = None) -> None:
            with pytest.raises(ValueError, match="another process is writing"):
                quantize_checkpoint(checkpoint, tmp_path / "out")

    quantize_checkpoint(checkpoint, tmp_path / "out", progress=Second())


@pytest.mark.skipif(os.name != "posix", reason="no such limit on this system")
def test_file_that_cannot_grow(sharded, tmp_path):
    import resource

    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # files stop growing there, as on a full disk
    try:
        with pytest.raises(OSError) as failed:
            quantize_checkpoint(sharded, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file = Path(failed.value.filename)
    assert failed.value.errno == errno.EFBIG
    assert file.parent == out and file.name.endswith(".safetensors.tmp")
    assert not file.exists() and not file.with_suffix("").exists() and not (out / "config.json").exists()


def test_full_disk_then_resume(sharded, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        out = disk / "out"
        with pytest.raises(
            OSError, match=r"No space left on device: '.*out/model-0000[234].*.safetensors.tmp'"
        ) as full:
            quantize_checkpoint(sharded, out)
        assert full.value.errno == errno.ENOSPC
        finished = sorted(p.name for p in out.glob("*.safetensors"))
        assert finished and len(finished) < 4 and not list(out.glob("*.tmp")) and not (out / "config.json").exists()
        for name in finished:
            read_header(out / name)
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        quantize_checkpoint(sharded, out)
        quantize_checkpoint(sharded, tmp_path / "b/out")
        assert contents(out) == contents(tmp_path / "b/out")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


MEASURED_RUN = """
import resource, sys
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from higgs.checkpoint import quantize_checkpoint
from higgs.energies import column_scale

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
quantize_checkpoint(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
def test_memory_holds_one_tensor(tmp_path):
    rows = torch.randn(1920, 4096)
    names = [f"blocks.{i}.proj.weight" for i in range(8)]
    source = write_checkpoint(tmp_path / "source", {n: rows.clone() for n in names}, {"model_type": "nobody_knows_it"})
    child = run_python(MEASURED_RUN, source, tmp_path / "out")
    stdout, stderr = child.communicate(timeout=50)
    assert child.returncode == 0, stderr
    assert int(stdout) < 2.5 * rows.nbytes, f"{int(stdout) / 1e6:.0f} MB for tensors of {rows.nbytes / 1e6:.0f} MB"
