"""The loss of a frozen output head, with the gradient of its input, without ever holding all logits.

    z = h W^T + b,   loss = sum_i (log sum_v exp z_iv - z_iy),   dloss/dh = softmax(z) W - W_y

The head is frozen, so its weight needs no gradient and two matrix products do: one for the logits of a chunk of rows,
one for the gradient. Between them the logits become `exp(z - max z)` in place, tile by tile over the vocabulary, and the
label's `exp(z_y - max z) - sum`, taken in fp32 so that a sure prediction leaves a small gradient and no rounding noise; the
division by the sum is left to the (rows, dim) product, which saves a pass over the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOGITS_AT_A_TIME = 2**26  # values; 128 MB in 16 bits. Larger chunks read the head's weight less often.
EVEN = 16  # rows of a chunk are a multiple of it: products of odd numbers of rows take up to a fifth longer
TILE = {"cpu": 2**19}  # values that are exponentiated at a time: on a CPU what its cache holds in fp32, else all
LOG2_E = 1 / math.log(2)  # exp(z) = 2^(z log2 e): MKL's exp takes three times as long on AMD, and exp2 is torch's own
LEAST = -80.0  # exponents below vanish beside the largest term's 1, and would give subnormal numbers, which are slow


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
        rows = _rows_of_a_chunk(len(labels), weight.shape[0])
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, -len(labels) % EVEN))
        memory = hidden.new_empty(rows * weight.shape[0])  # of every chunk's logits: new memory is slow at first touch
        for start in range(0, len(labels), rows):
            chunk = slice(start, start + rows)
            part, gradient[chunk] = _chunk(padded[chunk], weight, bias, labels[chunk], smoothing, wide, memory)
            loss += part
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None


def _rows_of_a_chunk(rows: int, words: int) -> int:
    """As many for each chunk, so that the last one is no small rest."""
    most = max(LOGITS_AT_A_TIME // words // EVEN, 1) * EVEN
    chunks = max(math.ceil(rows / most), 1)
    return max(math.ceil(rows / chunks / EVEN), 1) * EVEN


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    smoothing: float,
    wide: torch.dtype,
    memory: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss `()` and gradient `(rows, dim)` of the rows with a label, in the wide type; `hidden` may have more rows."""
    words, count = weight.shape[0], len(labels)
    padded = memory[: len(hidden) * words].view(len(hidden), words)
    torch.mm(hidden, weight.T, out=padded)
    logits = padded[:count]
    if bias is not None:
        logits += bias
    largest = logits.amax(1, keepdim=True).to(wide)
    row = torch.arange(count, device=labels.device)
    of_label = logits[row, labels].to(wide)
    total = logits.sum(1, dtype=wide) if smoothing else None
    sums = torch.zeros(count, dtype=wide, device=hidden.device)
    width = max(TILE.get(hidden.device.type, words * count) // count, 1)
    wide_memory = torch.empty(count, min(width, words), dtype=wide, device=hidden.device)
    for tile in logits.split(width, dim=1):
        exponentials = wide_memory[:, : tile.shape[1]].copy_(tile).sub_(largest).clamp_(min=LEAST).mul_(LOG2_E).exp2_()
        sums += exponentials.sum(1)
        tile.copy_(exponentials)
    log_sum = largest[:, 0] + sums.log()
    target = (of_label - largest[:, 0]).exp() - (1 - smoothing) * sums
    rounded = target.to(logits.dtype)
    logits[row, labels] = rounded
    gradient = (padded @ weight)[:count].to(wide) + (target - rounded)[:, None] * weight[labels].to(wide)
    gradient /= sums[:, None]
    loss = log_sum - (1 - smoothing) * of_label
    if total is not None:
        loss = loss - smoothing / words * total
        gradient -= smoothing * weight.mean(0, dtype=wide)
    return loss.sum(), gradient
