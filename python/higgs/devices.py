"""Which device a command works on."""

from __future__ import annotations

import os

import torch

from . import _core
from .errors import UnsupportedError


def pick_device(name: str) -> torch.device:
    """The device called ``name``: "cpu", "cuda", "cuda:1", or "auto", the first CUDA device if there is a usable one.

    Raises ValueError for another name, UnsupportedError if this machine, torch or build of higgs cannot use it.
    """
    reason = _why_no_cuda()
    if name == "auto":
        return torch.device("cpu" if reason else "cuda:0")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if reason:
        raise UnsupportedError(f"device {name!r} cannot be used: {reason}")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise UnsupportedError(f"device {name!r} cannot be used: there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def rank_device(name: str) -> torch.device:
    """Where a rank of ``torchrun`` runs an unquantized model: "cpu", or "cuda", the device of the rank's number on this
    machine (the first without ``torchrun``).

    Raises ValueError for another name, UnsupportedError if there is no such device.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise ValueError(f"device {name!r} is not supported; use cpu or cuda")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise UnsupportedError(
            f"device 'cuda' cannot be used by process {index} of this machine: torch finds {count} CUDA devices, and "
            "every process needs its own"
        )
    return torch.device("cuda", index)


def _why_no_cuda() -> str | None:
    if not _core.with_cuda:
        return "this build of higgs has no CUDA kernels"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device" if torch.version.cuda else "this build of torch has no CUDA"
    return None
