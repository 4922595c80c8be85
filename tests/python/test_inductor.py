"""``overlap_kernels`` without a GPU: what it sets, and where the kernels that inductor makes wait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from higgs import UnsupportedError
from higgs.integrations import inductor
from higgs.integrations.inductor import overlap_kernels
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import IndentedBuffer


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    overlap_kernels(False)


def test_switched_on_and_off() -> None:
    original, config, compiler = TritonKernel._filter_pdl, torch._inductor.config.triton, torch.compiler.config
    tag = compiler.cache_key_tag
    for enabled in (True, True, False, False):
        overlap_kernels(enabled)
        assert config.enable_pdl is enabled and (compiler.cache_key_tag != tag) is enabled
        assert (TritonKernel._filter_pdl is original) is not enabled


@pytest.mark.parametrize("early", [True, False])
def test_kernels_wait_before_all_else(early: bool, monkeypatch) -> None:
    """Also where inductor had them wait later, or let the next one start later; not where they are launched as ever."""
    monkeypatch.setattr(TritonKernel, "_enable_pdl_codegen", staticmethod(lambda: early))
    body = IndentedBuffer()
    lines = ["i = tl.program_id(0)", "for r in tl.range(0, 2, 1):", "    a = tl.load(x + i)", "tl.store(y + i, a)"]
    marks = ["tl.extra.cuda.gdc_launch_dependents()", "tl.extra.cuda.gdc_wait()"]
    body.writelines([*lines[:2], marks[1], *lines[2:], marks[1], marks[0]] if early else lines)
    overlap_kernels()
    TritonKernel._filter_pdl(object.__new__(TritonKernel), body)
    assert body.getvalue().splitlines() == [*(marks if early else []), *lines]


def test_inductor_without_such_launches(monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(UnsupportedError, match=r"inductor of PyTorch .* has no"):
        patch.setattr(inductor, "_filter_pdl", None)
        overlap_kernels()
