"""A frozen linear map whose weight is stored in another form and decoded where it is needed.

    y = x W^T + b,   dx = dy W,   W decoded in the forward pass and again in the backward one

Kept for the backward pass is nothing but a reference to the stored form: neither x, which no gradient needs, nor the decoded
weight, which would make every step as large as one on a dense base.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import is_tracing


class Decoded:
    """A frozen weight that exists while it is used: calling gives the dense tensor, `(out, in)`, of type `dtype`.

    Args:
        decode_to_scratch: decodes into memory that the next call overwrites; used where autograd does not record the product.
    """

    requires_grad = False

    def __init__(
        self,
        decode: Callable[[torch.dtype], Tensor],
        dtype: torch.dtype,
        decode_to_scratch: Callable[[torch.dtype], Tensor] | None = None,
    ) -> None:
        self.decode = decode
        self.dtype = dtype
        self.decode_to_scratch = decode if decode_to_scratch is None else decode_to_scratch

    def __call__(self) -> Tensor:
        return self.decode(self.dtype) if torch.is_grad_enabled() else self.decode_to_scratch(self.dtype)


def decoded_linear(x: Tensor, weight: Decoded, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` in x's type, which is the weight's; reference: `reference.decoded_linear`.

    Args:
        x: `(..., in)`.
        bias: `(out,)`, of x's type.
    """
    trained = bias is not None and bias.requires_grad
    if not torch.is_grad_enabled() or not x.requires_grad or trained or is_tracing():
        return F.linear(x, weight(), bias)
    result: Tensor = _DecodedLinear.apply(x, weight, bias)
    return result


def with_gradient(y: Tensor, x: Tensor, weight: Decoded) -> Tensor:
    """`y`, a product of `x` and `weight` that was computed out of autograd's sight, with its gradient `dx = dy W`."""
    result: Tensor = _WithGradient.apply(x, y, weight)
    return result


class _WithGradient(torch.autograd.Function):
    calls_no_modules = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Decoded) -> Tensor:
        ctx.weight = weight
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = upstream
        weight = ctx.weight()
        return dy.to(weight.dtype) @ weight, None, None


class _DecodedLinear(torch.autograd.Function):
    calls_no_modules = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Decoded, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight(), bias)  # (..., out)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = upstream
        return dy @ ctx.weight(), None, None  # (..., in)
