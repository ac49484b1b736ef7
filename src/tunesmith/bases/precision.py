"""Which number type a frozen base computes in fastest: bfloat16, where the machine multiplies it natively.

Only the base changes its type; adapters keep float32 values and gradients beside it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError

NAMES = ("auto", "float32", "bfloat16", "float16")


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
    """The type of that name; "auto" is `fast_dtype()`, and None leaves the base in the type it is stored in.

    Raises:
        ConfigError: the name is none of `NAMES`.
    """
    if name not in NAMES:
        raise ConfigError(f'dtype "{name}" is unknown; use {", ".join(NAMES)}')
    return fast_dtype() if name == "auto" else getattr(torch, name)


def _usual_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type
