"""The loss of a frozen output head, with the gradient of its input, without ever holding all logits.

    z = h W^T + b,   loss = sum_i (log sum_v exp z_iv - z_iy),   dloss/dh = softmax(z) W - W_y

The head is frozen, so its weight needs no gradient and two matrix products do: one for the logits of a chunk of rows,
one for the gradient. Between them the logits become `exp(z - max z)` in place, tile by tile over the vocabulary, and the
label's `exp(z_y - max z) - sum`, taken in fp32 so that a sure prediction leaves a small gradient and no rounding noise; the
division by the sum is left to the (rows, dim) product, which saves a pass over the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_A_TIME = 2**26  # values; 128 MB in 16 bits. Larger chunks read the head's weight less often.
TILE = 16_384  # values of one row that are exponentiated at a time


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum over rows of the cross-entropy of a frozen linear head; twin: `reference.linear_cross_entropy`.

    Args:
        hidden: `(rows, dim)`, rows with a label only.
        weight, bias: the head's, `(vocabulary, dim)` and `(vocabulary,)`; they get no gradient.
        labels: `(rows,)`.
        smoothing: share of the target that is spread evenly over the vocabulary.

    Returns:
        A scalar in fp32 (float64 for float64 inputs).
    """
    result: Tensor = _FrozenHead.apply(hidden, weight.detach(), None if bias is None else bias.detach(), labels, smoothing)
    return result


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden)
        rows = max(LOGITS_AT_A_TIME // weight.shape[0], 16)
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            part, gradient[chunk] = _chunk(hidden[chunk], weight, bias, labels[chunk], smoothing, wide)
            loss += part
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss `()` and gradient `(rows, dim)` of some rows, in the wide type."""
    words = weight.shape[0]
    logits = F.linear(hidden, weight, bias)  # (rows, vocabulary)
    largest = logits.amax(1, keepdim=True).to(wide)
    of_label = logits.gather(1, labels[:, None])[:, 0].to(wide)
    total = logits.sum(1, dtype=wide) if smoothing else None
    sums = torch.zeros(len(labels), dtype=wide, device=hidden.device)
    for tile in logits.split(TILE, dim=1):
        exponentials = torch.sub(tile, largest).exp_()  # in the wide type
        sums += exponentials.sum(1)
        tile.copy_(exponentials)
    log_sum = largest[:, 0] + sums.log()
    target = (of_label - largest[:, 0]).exp() - (1 - smoothing) * sums
    rounded = target.to(logits.dtype)
    logits.scatter_(1, labels[:, None], rounded[:, None])
    gradient = (logits @ weight).to(wide) + (target - rounded)[:, None] * weight[labels].to(wide)
    gradient /= sums[:, None]
    loss = log_sum - (1 - smoothing) * of_label
    if total is not None:
        loss = loss - smoothing / words * total
        gradient -= smoothing * weight.mean(0, dtype=wide)
    return loss.sum(), gradient
