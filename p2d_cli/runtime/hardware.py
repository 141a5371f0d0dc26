"""What a run ran on: processor, accelerator, versions, peak memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("p2d-cli", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pyarrow", "numpy")
GIB = 2**30


def package_versions() -> dict[str, str]:
    """Return the installed version of each package that can change a result, and Python's."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware(device: str, *, accelerators: int = 1) -> dict[str, Any]:
    """Return the machine's description.

    Args:
        device: the device that did the work, as torch writes it (`cpu`, `cuda:0`).
        accelerators: how many of its kind did.

    Returns:
        `label` (short and comparable between runs), `device`, `processor`, `cores`, `system`, and for CUDA
        `accelerators` and `accelerator_gib`.
    """
    processor = _processor_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    described: dict[str, Any] = {
        "device": device,
        "processor": processor,
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "label": f"{processor}, {cores} cores",
    }
    if device.startswith("cuda"):
        import torch

        properties = torch.cuda.get_device_properties(torch.device(device))
        described |= {"accelerators": accelerators, "accelerator_gib": round(properties.total_memory / GIB, 2)}
        described["label"] = f"{accelerators} x {properties.name}"
    elif device != "cpu":
        described["label"] = f"{device}, {processor}"
    return described


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def synchronizer(device: str) -> Callable[[], None]:
    """Return a function that waits until `device` has done all it was given."""
    if device.startswith("cuda"):
        import torch

        return lambda: torch.cuda.synchronize(torch.device(device))
    return lambda: None


def peak_memory_gib(device: str) -> dict[str, float]:
    """Return the peak resident memory of this process so far, and of the fullest accelerator if it uses any, in GiB."""
    peaks = {"host": _peak_host_bytes() / GIB}
    if device.startswith("cuda"):
        import torch

        peaks["device"] = max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / GIB
    return {name: round(value, 4) for name, value in peaks.items()}


def _peak_host_bytes() -> int:
    # Linux counts in `ru_maxrss` what the parent held when it started this process; VmHWM is this program's own.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").split("\n"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows has no resource module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def likely_dtype(asked: str, device: str) -> str:
    """Return the precision that `--dtype` stands for, without torch: bfloat16 where the hardware is fast at it.

    An accelerator is taken to be one of Ampere or later.
    """
    if asked != "auto":
        return asked
    if device.startswith("cuda") or (device == "auto" and Path("/dev/nvidia0").exists()):
        return "bfloat16"
    try:
        features = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "float32"
    return "bfloat16" if "amx_bf16" in features or "avx512_bf16" in features else "float32"
