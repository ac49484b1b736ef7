"""Orthogonal init: both factors random and not zero, yet B A = 0.

    A = P_odd^T X,   B = Y P_even,   with the rows of P orthonormal, so that P_even P_odd^T = 0

https://datta0.github.io/posts/rethink-lora-init/ (section "Orthogonal initialisation").
"""

from __future__ import annotations

import torch
from torch import Tensor

SPREAD = 0.1  # deviation of X and Y


def orthogonal(inner: int, out: int, r: int) -> tuple[Tensor, Tensor]:
    """A `(r, inner)` and B `(out, r)`; r is even."""
    rows = torch.linalg.qr(torch.randn(r, r)).Q
    a = rows[0::2].T @ (SPREAD * torch.randn(r // 2, inner))
    b = (SPREAD * torch.randn(out, r // 2)) @ rows[1::2]
    return a, b
