"""Which number type a frozen base computes in fastest: bfloat16, where the machine multiplies it natively.

Only the base changes its type; adapters keep float32 values and gradients beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .view import compute_dtype

WORTH_A_WORD = 50_000_000  # numbers in float32


def fast_dtype(device: torch.device | None = None) -> torch.dtype | None:
    """bfloat16 where `device` (by default the one a Trainer would take) has instructions for it, else None."""
    kind = _usual_device() if device is None else device.type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if kind == "cpu":
        cpu: Any = torch.cpu
        asks = (getattr(cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return torch.bfloat16 if any(ask() for ask in asks) else None
    return None


def dtype_named(name: str) -> torch.dtype | None:
    """The type of that name; "auto" is `fast_dtype()`, and None leaves the base in the type it is stored in."""
    return fast_dtype() if name == "auto" else getattr(torch, name)


def slower_than_need_be(base: nn.Module, device: torch.device) -> str | None:
    """What to do about a base whose number type `device` multiplies slowly; None where it is small or all is well."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in base.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    fast = fast_dtype(device)
    if fast is None or sizes.get(torch.float32, 0) < WORTH_A_WORD:
        return None
    return (
        f"the frozen base computes in float32, which {device.type} multiplies at about half the speed of bfloat16 or less; "
        "load it with dtype=torch.bfloat16 (adapters stay float32)"
    )


def adapter_dtype(module: nn.Module, full_precision: bool) -> torch.dtype:
    """fp32 masters beside a 16-bit base unless told otherwise, else the base's own type."""
    return master_dtype(compute_dtype(module), full_precision)


def master_dtype(dtype: torch.dtype, full_precision: bool) -> torch.dtype:
    return torch.float32 if full_precision and dtype in (torch.float16, torch.bfloat16) else dtype


def _usual_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type
