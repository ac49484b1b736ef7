"""Making a change sparse before it is combined with others, so that fewer of its values collide with theirs."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_largest(change: Tensor, density: float) -> Tensor:
    """The share `density` of the values with the largest magnitudes, zero elsewhere (https://arxiv.org/abs/2306.01708, 3.1)."""
    if density >= 1:
        return change
    flat = change.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(change)


def drop_randomly(change: Tensor, density: float) -> Tensor:
    """Each value kept with probability `density` and then divided by it, else zero (DARE, https://arxiv.org/abs/2311.03099)."""
    if density >= 1:
        return change
    return change * torch.bernoulli(torch.full_like(change, density)) / density
