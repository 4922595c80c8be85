"""`higgs doctor`: what this installation is and can do."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from .. import _core

_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "typer", "rich", "gguf", "matplotlib")


def examine() -> dict[str, Any]:
    """Facts as JSON-able data; never raises because a package is missing or broken."""
    return {
        "higgs": _core.version,
        "format_version": _core.format_version,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda_kernels": _core.with_cuda,
        "cuda": _cuda(),
        "instruction_sets": _core.supported_isas(),
        "instruction_set": _core.current_isa(),
        "threads": _core.num_threads(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "transformers_registered": _registered(),
        "grids": [{"name": g.name, "rate": g.rate, "t2": g.t2} for g in _core.grids()],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    import torch

    try:
        devices = [_device(i) for i in range(torch.cuda.device_count())]
    except Exception as e:  # a driver that does not fit, say: that is for this command to tell
        return {"available": False, "reason": str(e)}
    return {"available": bool(devices), "torch_cuda": torch.version.cuda, "devices": devices}


def _device(index: int) -> dict[str, Any]:
    import torch

    p = torch.cuda.get_device_properties(index)
    facts = {
        "name": p.name,
        "compute_capability": f"{p.major}.{p.minor}",
        "memory_gib": round(p.total_memory / 2**30, 1),
        "multiprocessors": p.multi_processor_count,
    }
    if _core.with_cuda:
        try:
            with torch.cuda.device(index):
                facts["shared_bytes_per_block"] = _core.cuda_current_device()["shared_bytes_per_block"]
                fmt = _core.Format("p2_n256", 4096, 4096, 1024, 1024, 0)
                facts["plan_4096x4096"] = _core.cuda_plan([fmt], 1, 1)
        except Exception as e:  # the runtime inside this build does not fit the driver, say
            facts["problem"] = str(e)
    return facts


def _registered() -> bool | str:
    """Whether transformers can load our checkpoints; or why that is not known."""
    from ..config import QUANT_METHOD

    try:
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    except Exception as e:
        return f"transformers cannot be imported: {e}"
    return QUANT_METHOD in AUTO_QUANTIZER_MAPPING and QUANT_METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING


def _device_text(device: dict[str, Any]) -> str:
    text = (
        f"{device['name']} (sm_{device['compute_capability'].replace('.', '')}, {device['memory_gib']} GiB, "
        f"{device['multiprocessors']} multiprocessors)"
    )
    return f"{text}, unusable: {device['problem']}" if "problem" in device else text


def as_text(facts: dict[str, Any]) -> str:
    """The facts as lines for a reader."""
    registered = {True: "yes", False: "no"}.get(facts["transformers_registered"], facts["transformers_registered"])
    cuda = facts["cuda"]
    devices = "; ".join(_device_text(d) for d in cuda.get("devices", [])) or cuda.get("reason") or "none"
    lines = [
        f"higgs {facts['higgs']} (format {facts['format_version']}), Python {facts['python']}, {facts['platform']}",
        f"CUDA kernels in this build: {'yes' if facts['cuda_kernels'] else 'no'}; GPUs seen by torch: {devices}",
        f"instruction sets: {', '.join(facts['instruction_sets'])} (in use: {facts['instruction_set']}), "
        f"{facts['threads']} threads",
        "packages: " + ", ".join(f"{name} {version or 'missing'}" for name, version in facts["packages"].items()),
        f"registered with transformers: {registered}",
        "",
        "grid        bits       t2",
    ]
    lines += [f"{g['name']:<9}  {g['rate']:5.2f}  {g['t2']:.6f}" for g in facts["grids"]]
    return "\n".join(lines)
