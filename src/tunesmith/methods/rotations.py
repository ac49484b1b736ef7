"""What OFT and BOFT share: rotations made of skew-symmetric matrices, and applying them block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases.view import BaseView


def cayley(skew: Tensor) -> Tensor:
    """The rotations `(I - Q)(I + Q)^-1` of skew-symmetric Q, `(..., size, size)`."""
    one = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
    rotations: Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
    return rotations


def some_unrotated(rotations: Tensor, p: float) -> Tensor:
    """The rotations `(..., size, size)` with each one replaced by the identity with probability `p`."""
    kept = torch.rand(*rotations.shape[:-2], 1, 1, device=rotations.device) >= p
    return torch.where(kept, rotations, torch.eye(rotations.shape[-1], device=rotations.device, dtype=rotations.dtype))


def blockwise(x: Tensor, matrices: Tensor) -> Tensor:
    """Each block of the last dimension of `x` times its own of the matrices `(blocks, size, size)`, or times the only one."""
    blocks, matrices = x.unflatten(-1, (-1, matrices.shape[-1])), matrices.to(x.dtype)
    if len(matrices) == 1:
        return (blocks @ matrices[0]).flatten(-2)
    return torch.einsum("...bi,bij->...bj", blocks, matrices).flatten(-2)  # a broadcast `@` would copy them for every row


def convolved(base: BaseView, x: Tensor, weight: Tensor) -> Tensor:
    """A convolution's output with another weight in place of its own."""
    y = base.product(x, weight.to(x.dtype))
    return y if base.bias is None else y + base.per_output(base.bias.to(y.dtype))
