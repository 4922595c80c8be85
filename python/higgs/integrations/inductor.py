"""torch.compile on CUDA: kernels start while the one before them runs, so that they are ready when their input is.

Programmatic dependent launch: a kernel that is launched so may start as soon as all CTAs of the one before have said
``griddepcontrol.launch_dependents`` or ended, and its ``griddepcontrol.wait`` returns when that one has ended and all
that it wrote can be read. Why this gives the results of kernels that run one after the other:

1. Every kernel launched so waits before it reads or writes global memory, in all CTAs that do: those of torch.compile
   first of all (``_wait_first``), those of higgs after they have loaded constants, which are the packed weights, their
   tables and scales, and the input vector.
2. So no such kernel ends before the one before it has, and when its wait returns, then, by induction, all kernels
   before it in the stream have ended, not the last alone.
3. All others (of cuDNN, cuBLAS, eager PyTorch, templates and kernels that users write) are launched as ever, and start
   when the one before has ended.
4. The constants are written by kernels of the third kind, so they are there when a kernel of the first may start.
"""

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

    Decode kernels of higgs then load table, scales and first weights meanwhile. The results are the same: every kernel
    that starts early waits for the one before it. This sets ``triton.enable_pdl`` of inductor, but for where kernels
    wait: inductor's own do so before they read what the kernel right before them wrote, and so may miss what an older
    one has not written yet. Works from sm_90 on and changes nothing elsewhere. UnsupportedError where PyTorch's
    inductor has no such launches (2.11 and 2.13 have them).
    """
    if _filter_pdl is None:
        raise UnsupportedError(f"overlap_kernels: inductor of PyTorch {torch.__version__} has no triton.enable_pdl")
    TritonKernel._filter_pdl = _wait_first if enabled else _filter_pdl  # type: ignore[method-assign, assignment]
    torch._inductor.config.triton.enable_pdl = enabled
    tag = torch.compiler.config.cache_key_tag.replace(_TAG, "")
    torch.compiler.config.cache_key_tag = tag + _TAG if enabled else tag


def _wait_first(kernel: TritonKernel, code: Any) -> None:
    """Puts before all of ``code``, the body of ``kernel``: let the next kernel start, then wait for the one before."""
    if not kernel._enable_pdl_codegen():
        return
    lines = [line for line in code._lines if not (isinstance(line, str) and "tl.extra.cuda.gdc_" in line)]
    code._lines = [kernel.GDC_LAUNCH, kernel.GDC_WAIT, *lines]
