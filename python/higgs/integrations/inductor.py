"""torch.compile on CUDA: kernels start while the one before them runs, so that they are ready when their input is."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.codegen.triton import TritonKernel

from ..errors import UnsupportedError

_TAG = " higgs: kernels overlap"  # of cached kernels
_filter_pdl = getattr(TritonKernel, "_filter_pdl", None)


def overlap_kernels(enabled: bool = True) -> None:
    """Kernels that torch.compile makes from now on start while the kernel before them runs, and let the one after them
    do so, or, with ``enabled`` False, no longer.

    Decode kernels of higgs then load table, scales and first weights meanwhile. Every kernel that starts early waits,
    before it reads or writes anything but constants, for the end of the one before, which has waited itself: the
    results are the same bits. That is ``triton.enable_pdl`` of inductor, which it sets, but for where kernels wait:
    inductor's own do so before they read what the kernel right before them wrote, and so may miss what an older one
    has not written yet. Works from sm_90 on and changes nothing elsewhere. UnsupportedError where inductor lacks it.
    """
    if _filter_pdl is None:
        raise UnsupportedError(f"overlap_kernels: inductor of PyTorch {torch.__version__} has no triton.enable_pdl")
    TritonKernel._filter_pdl = _wait_first if enabled else _filter_pdl  # type: ignore[method-assign, assignment]
    torch._inductor.config.triton.enable_pdl = enabled
    tag = torch.compiler.config.cache_key_tag.replace(_TAG, "")
    torch.compiler.config.cache_key_tag = tag + _TAG if enabled else tag


def _wait_first(kernel: TritonKernel, code: Any) -> None:
    """Lets the next kernel start and waits for the one before, in this order, before all other ``code``."""
    if not kernel._enable_pdl_codegen():
        return
    lines = [line for line in code._lines if not (isinstance(line, str) and "tl.extra.cuda.gdc_" in line)]
    code._lines = [kernel.GDC_LAUNCH, kernel.GDC_WAIT, *lines]
