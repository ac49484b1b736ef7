"""Causal attention of one short text with 16-bit numbers on a CPU, where torch's flash attention is slow.

The text may stand behind others' keys and values (virtual tokens), which all of its tokens see.

    P = softmax(s Q K^T + mask),   Y = P V
    dV = P^T dY,   dS = P * (dY V^T - rowsum(dY * Y)),   dQ = s dS K,   dK = s dS^T Q

Heads that share keys are the rows of one product. P is recomputed in the backward pass, so nothing of the size of
scores is kept. The formulas are those of Dao et al. 2022, "FlashAttention", https://arxiv.org/abs/2205.14135 (appendix B),
in plain products, which on a CPU beat blocks up to some hundred tokens (docs/design/log.md has the figures).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lora_linear import PLAIN
from .tracing import is_tracing

LONGEST = 400  # tokens; beyond, blocks win. Of keys twice as many, where they are more


def short_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """`softmax(scale Q K^T + causal mask) V` for each head; reference: `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: `(1, heads, length, head_dim)`.
        key, value: `(1, groups, before + length, head_dim)`, each for `heads / groups` heads.
        scale: `head_dim ** -0.5` if None.
    """
    groups, _, width = key.shape[1:]
    tall = query.reshape(groups, -1, width)  # (groups, heads / groups * length, head_dim)
    scale = width**-0.5 if scale is None else scale
    result: Tensor = _ShortAttention.apply(tall, key[0], value[0], scale, query.shape[2])
    return result.view(query.shape)


def applies(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `short_attention` is right and fast: for plain short tensors of 16 bits on a CPU, outside of tracing."""
    return (
        query.device.type == "cpu"
        and query.dtype.itemsize == 2
        and query.shape[2] <= LONGEST
        and query.shape[2] <= key.shape[2] <= 2 * LONGEST
        and query.shape[0] == 1
        and query.shape[3] == value.shape[3]
        and all(type(tensor) in PLAIN for tensor in (query, key, value))
        and not is_tracing()
    )


def _weights(query: Tensor, key: Tensor, scale: float, length: int) -> Tensor:
    """P, `(groups, heads / groups * length, before + length)`."""
    groups, seen, _ = key.shape
    scores = torch.bmm(query * scale, key.transpose(1, 2)).view(groups, -1, length, seen)
    future = torch.full((length, seen), -torch.inf, dtype=scores.dtype).triu_(1 + seen - length)
    return torch.softmax(scores.add_(future), -1).view(groups, -1, seen)


class _ShortAttention(torch.autograd.Function):
    calls_no_modules = True

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, length: int) -> Tensor:
        y = torch.bmm(_weights(query, key, scale, length), value)
        ctx.save_for_backward(query, key, value, y)
        ctx.scale, ctx.length = scale, length
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, y = ctx.saved_tensors
        weights = _weights(query, key, ctx.scale, ctx.length)
        means = (dy.float() * y.float()).sum(-1, keepdim=True).to(dy.dtype)
        dvalue = torch.bmm(weights.transpose(1, 2), dy)
        dscores = torch.bmm(dy, value.transpose(1, 2)).sub_(means).mul_(weights)
        dquery = torch.bmm(dscores, key).mul_(ctx.scale)
        dkey = torch.bmm(dscores.transpose(1, 2), query).mul_(ctx.scale)
        return dquery, dkey, dvalue, None, None
