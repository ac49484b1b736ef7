"""Weighted sums of changes: the plain one, and the one that sign conflicts do not cancel out."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sum(changes: list[Tensor], weights: list[float]) -> Tensor:
    """`sum_i w_i t_i`."""
    return sum((change * weight for change, weight in zip(changes, weights)), torch.zeros_like(changes[0]))


def agreed_mean(changes: list[Tensor], weights: list[float], by: str) -> Tensor:
    """TIES: at each place the mean of `w_i t_i` over those changes that have the elected sign.

    Yadav et al. 2023, https://arxiv.org/abs/2306.01708 (section 3). The sign is that of the sum of values (`by="total"`)
    or of the sum of signs (`by="frequency"`), plus where the sum is zero.
    """
    stacked = torch.stack(changes)  # (adapters, ...)
    votes = stacked if by == "total" else stacked.sign()
    elected = torch.where(votes.sum(0) >= 0, 1, -1)  # (...)
    agrees = stacked.sign() == elected  # (adapters, ...)
    agreed = [change * mask for change, mask in zip(changes, agrees)]
    return weighted_sum(agreed, weights) / agrees.sum(0).clamp(min=1)
