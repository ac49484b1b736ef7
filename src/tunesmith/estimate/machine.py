"""How fast this machine is, measured in half a second: products of matrices, and passes over memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SECONDS = 0.2  # for each of the two


def products_per_second(dtype: torch.dtype, device: str = "cpu") -> float:
    """Multiplications and additions of products as large as a small model's."""
    tokens, width = 512, 2048
    x, weight = torch.ones(tokens, width, dtype=dtype, device=device), torch.ones(width, width, dtype=dtype, device=device)
    return 2 * tokens * width * width * _calls_per_second(lambda: x @ weight, device)


def bytes_per_second(device: str = "cpu") -> float:
    """Bytes written by an operation that goes through memory once."""
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


def memory(device: str = "cpu") -> int | None:
    """Bytes of memory that are free now."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    except OSError:
        return None
    return found.get("MemAvailable")
