"""What a run ran on: processor, accelerator, versions, peak memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    processor = _kernel_says("cpuinfo", "model name") or platform.processor() or platform.machine()
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


def whereabouts(device: str) -> tuple[str, str]:
    """Return the names of this machine and of the device on it, which tell two ranks apart; no manifest keeps them."""
    if device.startswith("cuda"):
        import torch

        properties = torch.cuda.get_device_properties(torch.device(device))
        return platform.node(), str(getattr(properties, "uuid", device))
    return platform.node(), device


def combine_hardware(ranks: Sequence[dict[str, Any]], where: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the description of what several processes ran on; the label says how many of what.

    Args:
        ranks: `describe_hardware` of each, that of rank 0 first.
        where: `whereabouts` of each.
    """
    if len(ranks) == 1:
        return ranks[0]
    hosts = len({host for host, _ in where})
    combined = ranks[0] | {"processes": len(ranks), "hosts": hosts}
    if all("accelerators" in rank for rank in ranks):
        # Ranks that share a GPU do not make two of it.
        names = {place: rank["label"].removeprefix("1 x ") for place, rank in zip(where, ranks, strict=True)}
        shared = f", {len(ranks)} processes" if len(names) < len(ranks) else ""
        return combined | {"accelerators": len(names), "label": _counted(names.values(), "x") + shared}
    machines = f", {hosts} machines" if hosts > 1 else ""
    return combined | {"label": _counted((rank["label"] for rank in ranks), "processes on") + machines}


def _counted(names: Iterable[str], between: str) -> str:
    return " + ".join(f"{count} {between} {name}" for name, count in sorted(Counter(names).items()))


def highest_memory_gib(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the highest of each of the peaks of several processes."""
    names = dict.fromkeys(name for peaks in ranks for name in peaks)
    return {name: max(peaks.get(name, 0.0) for peaks in ranks) for name in names}


def _kernel_says(file: str, name: str, folder: Path = Path("/proc")) -> str | None:
    """Return what stands behind the first line of this name in a file of /proc; None where there is none."""
    with contextlib.suppress(OSError):
        for line in (folder / file).read_text(encoding="utf-8").split("\n"):
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process may still take: what the system has, and what its control groups leave it.

    Where the system does not say, it is taken to be 4 GiB. A batch queue limits a job by a group far below the top one,
    while the system counts the memory of the whole node.

    Args:
        root: of the file system, whose `proc` and `sys` are read.
    """
    said = _kernel_says("meminfo", "MemAvailable:", root / "proc")
    free = 4 * GIB if said is None else int(said.split()[0]) * 1024
    return min([free, *_left_by_groups(root)])


def _left_by_groups(root: Path) -> Iterator[int]:
    """Yield what each memory control group that this process is in leaves it, of either version of the kernel's."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = top / path.lstrip("/")
        for one in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such group, or one without a limit
                limit, used = (int((one / name).read_text(encoding="utf-8")) for name in names)
                yield max(limit - used, 0)
            if one == top:
                break


def synchronizer(device: str) -> Callable[[], None]:
    """Return a function that waits until `device` has done all it was given."""
    if device.startswith("cuda"):
        import torch

        return lambda: torch.cuda.synchronize(torch.device(device))
    return lambda: None


def forget_peak_memory() -> None:
    """Begin to measure peaks anew where the system allows it: a process may do several stages, one after the other."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM becomes what is resident now
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: str) -> dict[str, float]:
    """Return peaks since the last `forget_peak_memory`, in GiB.

    That of the resident memory of this process, and of the fullest accelerator if it uses any.
    """
    peaks = {"host": _peak_host_bytes() / GIB}
    if device.startswith("cuda"):
        import torch

        peaks["device"] = max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / GIB
    return {name: round(value, 4) for name, value in peaks.items()}


def _peak_host_bytes() -> int:
    # Linux counts in `ru_maxrss` what the parent held when it started this process; VmHWM is this program's own.
    if (peak_kib := _kernel_says("self/status", "VmHWM:")) is not None:
        return int(peak_kib.split()[0]) * 1024
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
    features = _kernel_says("cpuinfo", "flags") or ""
    return "bfloat16" if "amx_bf16" in features or "avx512_bf16" in features else "float32"
