"""PiSSA: the factors start as the weight's largest singular parts, so training begins where the weight says most.

    W = U S V^T,   B = U_r S_r^(1/2) / s^(1/2),   A = S_r^(1/2) V_r^T / s^(1/2),   so that   s B A = U_r S_r V_r^T

Meng, Wang, Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
https://arxiv.org/abs/2404.02948 (section 3); the quick form: Halko, Martinsson, Tropp 2011,
https://arxiv.org/abs/0909.4061 (algorithm 4.4).
"""

from __future__ import annotations

import torch
from torch import Tensor


def pissa(weight: Tensor, r: int, scale: float, rounds: int | None = None) -> tuple[Tensor, Tensor]:
    """A `(r, in)` and B `(out, r)` from the weight `(out, in)`.

    Args:
        rounds: of the quick form, whose random projection is the same each time; None computes the exact one.
    """
    if rounds is None:
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, sizes, right = _quick_svd(weight, r, rounds)
    roots = (sizes[:r] / scale).sqrt()
    return roots[:, None] * right[:r], left[:, :r] * roots


def _quick_svd(weight: Tensor, r: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first r singular parts, from a random subspace that each round turns towards them.

    The numbers are drawn on the CPU from a fixed seed, so that the same base gives the same factors on every machine
    and an adapter's file need not hold them.
    """
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(weight.shape[1], r, generator=draw, dtype=torch.float32).to(weight)
    basis = torch.linalg.qr(weight @ start).Q  # (out, r)
    for _ in range(rounds):
        basis = torch.linalg.qr(weight.T @ basis).Q  # (in, r)
        basis = torch.linalg.qr(weight @ basis).Q
    left, sizes, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ left, sizes, right
