"""torch.compile on CUDA: its kernels let the one after them start early, so that a decode kernel is ready when x is."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.virtualized import V

_START = "tl.extra.cuda.gdc_launch_dependents()"
_TAG = " higgs: kernels overlap"  # of cached kernels
_codegen_body = TritonKernel.codegen_body


def overlap_kernels(enabled: bool = True) -> None:
    """Kernels that torch.compile makes from now on let the kernel after them start while they run or, with ``enabled``
    False, no longer.

    Decode kernels of higgs then load table, scales and first weights meanwhile, and wait before they read x. All other
    kernels start as ever, when the one before has ended, as they are not launched to start early; inductor's own
    ``triton.enable_pdl`` launches its kernels so, too, and they do not wait for all that they read. Works from sm_90 on
    and changes nothing elsewhere.
    """
    TritonKernel.codegen_body = _overlapped if enabled else _codegen_body  # type: ignore[method-assign]
    tag = torch.compiler.config.cache_key_tag.replace(_TAG, "")
    torch.compiler.config.cache_key_tag = tag + _TAG if enabled else tag


@functools.wraps(_codegen_body)
def _overlapped(kernel: TritonKernel) -> Any:
    result = _codegen_body(kernel)
    body = kernel.body._lines
    device = V.graph.get_current_device_or_throw()
    if body and _START not in body and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        body.insert(0, _START)
    return result
