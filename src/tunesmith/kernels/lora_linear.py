"""A frozen linear map with a low-rank change beside it, in one step of autograd.

    y = x W^T + b + s h B^T,   h = x A^T
    g = s dy B,   dx = dy W + g A,   dA = g^T x,   dB = s dy^T h

The change is added into the product's own memory, in both directions, so the change of `(tokens, out)` and its gradient of
`(tokens, in)` never exist. Kept for the backward pass are x, which modules with one input share, and h, which is rank wide;
factors of a wider type than x (fp32 masters) are rounded in each direction rather than kept twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .decoded_linear import Decoded

PLAIN = (Tensor, nn.Parameter)  # subclasses (sharded, quantised, traced tensors) compute in ways of their own


def lora_linear(x: Tensor, weight: Tensor | Decoded, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`x W^T + bias + scale x A^T B^T`, in x's type; reference: `reference.lora_linear`.

    Args:
        x: `(..., in)`.
        weight, bias: `(out, in)` and `(out,)`, of x's type; frozen. A `Decoded` weight is decoded in each direction.
        a, b: `(r, in)` and `(out, r)`, of any floating-point type, which their gradients have, too.
    """
    y, _ = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, a, b, scale)  # (tokens, out)
    result: Tensor = y.view(*x.shape[:-1], b.shape[0])
    return result


def applies(x: Tensor, weight: Tensor | Decoded, bias: Tensor | None) -> bool:
    """Whether `lora_linear` can replace its reference: on plain tensors of one type, nothing trained but the factors, and
    nothing around the call that has to see each operation (autocast, `torch.func`, forward-mode gradients, tracing).
    """
    frozen = (weight,) if bias is None else (weight, bias)
    return (
        type(x) in PLAIN
        and all(type(value) in PLAIN or isinstance(value, Decoded) for value in frozen)
        and all(value.dtype == x.dtype and not value.requires_grad for value in frozen)
        and x.layout is torch.strided
        and not x.is_nested
        and (x.is_meta or not torch.is_autocast_enabled(x.device.type))  # asking of "meta" is an error
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )


class _LoraLinear(torch.autograd.Function):
    """`(y, h)`; h is an output so that gradients of gradients know what it depends on."""

    calls_no_modules = True

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | Decoded, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        h = x @ a.to(x.dtype).T  # (tokens, r)
        dense = weight() if isinstance(weight, Decoded) else weight  # (out, in)
        y = x @ dense.T if bias is None else torch.addmm(bias, x, dense.T)  # (tokens, out)
        y.addmm_(h, b.to(x.dtype).T, alpha=scale)
        _, _, _, trains_a, trains_b, _ = ctx.needs_input_grad
        kept = None if isinstance(weight, Decoded) else weight
        ctx.save_for_backward(x if trains_a else None, kept, a, b, h if trains_b else None)
        ctx.decoded, ctx.scale = (weight if kept is None else None), scale
        return y, h

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        dy, dh = upstream
        x, weight, a, b, h = ctx.saved_tensors
        wants_x, _, _, trains_a, trains_b, _ = ctx.needs_input_grad
        dx = da = db = None
        if wants_x or trains_a:
            g = dh + ctx.scale * (dy @ b.to(dy.dtype))  # (tokens, r)
        if wants_x:
            dx = (dy @ (weight if ctx.decoded is None else ctx.decoded())).addmm_(g, a.to(dy.dtype))  # (tokens, in)
        if trains_a:
            da = (g.T @ x).to(a.dtype)  # (r, in)
        if trains_b:
            db = ctx.scale * (dy.T @ h).to(b.dtype)  # (out, r)
        return dx, None, None, da, db, None
