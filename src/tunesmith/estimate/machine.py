"""This machine: how fast it computes, measured in half a second, and how much memory it has."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

SECONDS = 0.2  # for each of the two speeds


def products_per_second(dtype: torch.dtype, device: str = "cpu") -> float:
    """Multiplications and additions of products as large as a small model's."""
    tokens, width = 512, 2048
    x, weight = torch.ones(tokens, width, dtype=dtype, device=device), torch.ones(width, width, dtype=dtype, device=device)
    return 2 * tokens * width * width * _calls_per_second(lambda: x @ weight, device)


def bytes_per_second(device: str = "cpu") -> float:
    """Bytes written by an operation that passes over memory once."""
    x = torch.ones(2**23, dtype=torch.float32, device=device)
    return x.nbytes * _calls_per_second(lambda: x + 1, device)


def _calls_per_second(call: Callable[[], object], device: str) -> float:
    call()
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        call()
        calls += 1
        if device != "cpu":
            torch.accelerator.synchronize()
    return calls / (time.perf_counter() - started)


def available_memory(device: str = "cpu") -> int | None:
    """Bytes that are free now; None where the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        return 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError):
        return None


def total_memory() -> int | None:
    """Bytes of the machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def peak_memory() -> int | None:
    """The most bytes that tensors held on the GPU, or without one this process; None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident()


def peak_resident() -> int | None:
    """The most bytes that this process held; None where the system does not tell."""
    try:  # the process's own: what `resource` tells on Linux begins with that of the process that started it
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
