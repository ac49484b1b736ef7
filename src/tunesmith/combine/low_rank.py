"""The best factors of a given rank for a change, by singular value decomposition."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor


def factors_of(change: Tensor, rank: int, clamp: float | None, **options: Any) -> tuple[Tensor, Tensor]:
    """`(A, B)` with `B A` nearest to `change`.

    Args:
        change: `(out, in)`.
        clamp: the quantile of the factors' values beyond which they are cut off; None leaves them as they are.
        options: `full_matrices` and `driver` of `torch.linalg.svd`.

    Returns:
        A `(rank, in)` and B `(out, rank)`, filled up with zeros where `change` has fewer dimensions.
    """
    left, sizes, right = torch.linalg.svd(change, **options)
    a, b = right[:rank], left[:, :rank] * sizes[:rank]
    if clamp is not None:
        values = torch.cat([b.flatten(), a.flatten()]).cpu().numpy()  # torch.quantile takes no more than 2^24 values
        limit = float(numpy.quantile(values, clamp))
        a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
    return padded(a, rank, 0), padded(b, rank, 1)


def factors_of_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As `factors_of(b @ a, rank)`, without ever forming the product: seconds instead of minutes for a large base."""
    b_basis, b_rest = torch.linalg.qr(b)  # (out, r), (r, r)
    a_basis, a_rest = torch.linalg.qr(a.T)  # (in, r), (r, r)
    inner_a, inner_b = factors_of(b_rest @ a_rest.T, rank, None)
    return inner_a @ a_basis.T, b_basis @ inner_b


def padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """`factor` filled up with zeros to `rank` along `dim`: its product with the other factor stays the same."""
    missing = rank - factor.shape[dim]
    if missing <= 0:
        return factor
    shape = [*factor.shape[:dim], missing, *factor.shape[dim + 1 :]]
    return torch.cat([factor, factor.new_zeros(shape)], dim)
