"""Sums, solutions and decompositions need more digits than 16 bits hold."""

from __future__ import annotations

import torch
from torch import Tensor


def fp32_or_wider(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit types, else the type itself."""
    return torch.promote_types(dtype, torch.float32)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in its own type where that is wider."""
    return tensor.to(fp32_or_wider(tensor.dtype))
