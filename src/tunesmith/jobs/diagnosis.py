"""What this machine has, and what that means for training on it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..tested import TORCH, TRANSFORMERS
from .versions import NOT_INSTALLED, version_of

PACKAGES = ("tunesmith", "torch", "transformers", "accelerate", "safetensors", "huggingface_hub")
OPTIONAL = {
    "bitsandbytes": "4-bit and 8-bit bases",
    "pyarrow": "parquet files",
    "datasets": "data sets from the Hub",
    "matplotlib": "plots",
}


@dataclass(frozen=True)
class Finding:
    """One line: a fact, or what helps or slows down training."""

    kind: Literal["fact", "good", "slow"]
    topic: str
    text: str


def findings() -> Iterator[Finding]:
    """Everything worth knowing, in the order in which it is shown."""
    yield Finding("fact", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("fact", "versions", ", ".join(f"{name} {version_of(name)}" for name in PACKAGES))
    yield from _tested()
    for name, use in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            yield Finding("fact", name, f"not installed: no {use} (pip install {name})")
        else:
            yield Finding("good", name, f"{version_of(name)}: {use}")
    yield from _processor()
    yield from _accelerator()
    yield from _surroundings()


def _tested() -> Iterator[Finding]:
    """Which releases of transformers and torch are tested, and whether those installed are among them."""
    yield Finding("fact", "tested with", f"{TRANSFORMERS}; {TORCH}")
    installed = version_of("transformers")
    fault = None if installed == NOT_INSTALLED else TRANSFORMERS.fault(installed)
    if fault:
        yield Finding("slow", "transformers", fault)


def _processor() -> Iterator[Finding]:
    import torch

    from ..estimate.machine import total_memory

    threads, cores, memory = torch.get_num_threads(), os.cpu_count() or 1, total_memory()
    size = "unknown memory" if memory is None else f"{memory / 1e9:.1f} GB of memory"
    yield Finding("fact", "processor", f"{cores} cores, {threads} threads for torch, {size}")
    if threads < cores:
        reason = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else "torch's default"
        yield Finding("slow", "threads", f"torch uses {threads} of {cores} cores ({reason})")
    flags = _processor_flags()
    if "amx_bf16" in flags:
        yield Finding("good", "bfloat16", "the processor has bf16 matrix instructions (AMX): bf16 bases are fast")
    elif "avx512_bf16" in flags:
        yield Finding("good", "bfloat16", "the processor has bf16 instructions (AVX-512): bf16 bases take half the memory")
    elif flags:
        yield Finding(
            "slow", "bfloat16", "the processor has no bf16 instructions: bf16 bases save memory, fp32 bases are faster"
        )


def _processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return set(lines[0].partition(":")[2].split()) if lines else set()


def _accelerator() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            text = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"
            yield Finding("good", f"gpu {index}", text)
        if not torch.cuda.is_bf16_supported():
            yield Finding("slow", "bfloat16", "this GPU does not support bf16: bases run in fp32 or fp16")
    elif torch.backends.mps.is_available():
        yield Finding("good", "gpu", "Apple GPU, through MPS")
    else:
        built = "torch is built for CPUs only" if torch.version.cuda is None else "no driver or device found"
        yield Finding("slow", "gpu", f"none ({built}); models of up to about 1 billion parameters are practical here")


def _surroundings() -> Iterator[Finding]:
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    place = next(path for path in (cache, *cache.parents) if path.exists())
    yield Finding("fact", "model cache", f"{cache}, {shutil.disk_usage(place).free / 1e9:.0f} GB free")
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True", "ON", "on", "yes", "YES"):
        yield Finding("fact", "hub", "HF_HUB_OFFLINE is set: only cached models, local folders and sprout can be loaded")
    free = shutil.disk_usage(".").free / 1e9
    yield Finding("fact" if free > 2 else "slow", "this folder", f"{free:.0f} GB free for adapters and checkpoints")
