"""The dtype in which a frozen base computes fastest: bfloat16 where the hardware supports it natively.

Only the base's dtype changes; adapters keep float32 values and gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .stored_tensors import computing_type
from .view import compute_dtype

MIN_SIZE_FOR_ADVICE = 50_000_000  # float32 parameters


def fast_dtype(device: torch.device | None = None) -> torch.dtype | None:
    """bfloat16 if `device` (by default the one a Trainer would use) supports it natively, else None."""
    kind = _usual_device() if device is None else device.type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if kind == "cpu":
        cpu: Any = torch.cpu
        asks = (getattr(cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return torch.bfloat16 if any(ask() for ask in asks) else None
    return None


def dtype_named(name: str) -> torch.dtype | None:
    """The dtype of that name; "auto" means `fast_dtype()`, and None keeps the dtype of the stored base."""
    return fast_dtype() if name == "auto" else getattr(torch, name)


def usual_dtype(base: nn.Module) -> torch.dtype:
    """The 16- or 32-bit type of most numbers in a base's parameters; float32 if it has none of such a type."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in base.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float32):
            sizes[parameter.dtype] += parameter.numel()
    return next((dtype for dtype, _ in sizes.most_common(1)), torch.float32)


def convert(base: nn.Module, types: Mapping[torch.dtype, torch.dtype]) -> None:
    """Convert parameters and buffers of these types; what a base keeps in another type on purpose stays."""
    for tensor in (*base.parameters(), *base.buffers()):
        tensor.data = tensor.data.to(types.get(tensor.dtype, tensor.dtype))


def slower_than_need_be(base: nn.Module, device: torch.device) -> str | None:
    """Advice on a base whose dtype is slow on `device`; None if it is small or there is nothing to improve."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in base.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    fast = fast_dtype(device)
    if fast is None or sizes.get(torch.float32, 0) < MIN_SIZE_FOR_ADVICE:
        return None
    return (
        f"the frozen base computes in float32, which on {device.type} is at most about half as fast as bfloat16; "
        "load it with dtype=torch.bfloat16 (adapters stay in float32)"
    )


def adapter_dtype(module: nn.Module, full_precision: bool) -> torch.dtype:
    """fp32 for adapters on a 16-bit base if `full_precision`, else the base's own dtype."""
    return master_dtype(compute_dtype(module), full_precision)


def master_dtype(dtype: torch.dtype, full_precision: bool) -> torch.dtype:
    dtype = computing_type(dtype)
    return torch.float32 if full_precision and dtype in (torch.float16, torch.bfloat16) else dtype


def _usual_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type
