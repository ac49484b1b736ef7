"""OLoRA: the factors start as the first columns and rows of the weight's QR decomposition.

    W = Q R,   B = Q_r,   A = R_r

Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2406.01775
(section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor


def olora(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A `(r, in)` and B `(out, r)` from the weight `(out, in)`."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]
