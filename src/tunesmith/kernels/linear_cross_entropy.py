"""The loss of a frozen output head, with the gradient of its input, without ever holding all logits.

    z = h W^T + b,   loss = sum_i (log sum_v exp z_iv - z_iy),   dloss/dh = softmax(z) W - W_y

The head is frozen, so its weight needs no gradient and two matrix products do: one for the logits of a chunk of rows,
one for the gradient. Between them the logits become `exp(z - max z)` in place, tile by tile over the vocabulary, and the
label's `exp(z_y - max z) - sum`, taken in fp32 so that a sure prediction leaves a small gradient and no rounding noise; the
division by the sum is left to the (rows, dim) product, which saves a pass over the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fp32 import fp32_or_wider

LOGITS_AT_A_TIME = 2**26  # values; 128 MB in 16 bits. Larger chunks read the head's weight less often.
EVEN = 16  # rows of a chunk are a multiple of it: products of odd numbers of rows take up to a fifth longer
LOG2_E = 1 / math.log(2)  # exp(z) = 2^(z log2 e): MKL's exp takes three times as long on AMD, and exp2 is torch's own
LEAST = -80.0  # exponents below vanish beside the largest term's 1, and would give subnormal numbers, which are slow


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    smoothing: float = 0.0,
    tile: int | None = None,
) -> Tensor:
    """Sum over rows of the cross-entropy of a frozen linear head; defined by `reference.linear_cross_entropy`.

    Args:
        hidden: `(rows, dim)`, rows with a label only.
        weight, bias: the head's, `(vocabulary, dim)` and `(vocabulary,)`; they get no gradient.
        labels: `(rows,)`.
        smoothing: share of the target that is spread evenly over the vocabulary.
        tile: values that are exponentiated at a time; None is what `tile_on` says of the device.

    Returns:
        A scalar in fp32 (float64 for float64 inputs).
    """
    tile = tile_on(hidden.device.type) if tile is None else tile
    frozen_bias = None if bias is None else bias.detach()
    result: Tensor = _FrozenHead.apply(hidden, weight.detach(), frozen_bias, labels, smoothing, tile)
    return result


def tile_on(device: str) -> int:
    """How many values are exponentiated at a time: on a CPU what its cache holds in fp32, else a whole chunk's."""
    return 2**19 if device == "cpu" else LOGITS_AT_A_TIME


@dataclass(frozen=True)
class _Head:
    """What is the same for every chunk."""

    weight: Tensor
    bias: Tensor | None
    smoothing: float
    tile: int


class _FrozenHead(torch.autograd.Function):
    calls_no_modules = True

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float, tile: int
    ) -> Tensor:
        head, words = _Head(weight, bias, smoothing, tile), weight.shape[0]
        loss = torch.zeros((), dtype=fp32_or_wider(hidden.dtype), device=hidden.device)
        gradient = torch.empty_like(hidden)
        rows = _rows_of_a_chunk(len(labels), words)
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, -len(labels) % EVEN))
        memory = hidden.new_empty(rows * words)  # of every chunk's logits: new memory is slow at first touch
        for start in range(0, len(labels), rows):
            chunk = slice(start, start + rows)
            part, gradient[chunk] = _chunk(padded[chunk], labels[chunk], head, memory)
            loss += part
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None, None


def _rows_of_a_chunk(rows: int, words: int) -> int:
    """The same for every chunk, so that the last one is not much smaller."""
    most = max(LOGITS_AT_A_TIME // words // EVEN, 1) * EVEN
    chunks = max(math.ceil(rows / most), 1)
    return max(math.ceil(rows / chunks / EVEN), 1) * EVEN


def _chunk(hidden: Tensor, labels: Tensor, head: _Head, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Loss `()` and gradient `(rows, dim)` of the rows with a label, in at least fp32; `hidden` may have more rows."""
    weight, smoothing, wide = head.weight, head.smoothing, fp32_or_wider(hidden.dtype)
    words, count = weight.shape[0], len(labels)
    padded = memory[: len(hidden) * words].view(len(hidden), words)
    torch.mm(hidden, weight.T, out=padded)
    logits = padded[:count]
    if head.bias is not None:
        logits += head.bias
    largest = logits.amax(1, keepdim=True).to(wide)
    row = torch.arange(count, device=labels.device)
    of_label = logits[row, labels].to(wide)
    total = logits.sum(1, dtype=wide) if smoothing else None
    sums = _exponentiate(logits, largest, head.tile)
    target = (of_label - largest[:, 0]).exp() - (1 - smoothing) * sums
    rounded = target.to(logits.dtype)
    logits[row, labels] = rounded
    gradient = (padded @ weight)[:count].to(wide) + (target - rounded)[:, None] * weight[labels].to(wide)
    gradient /= sums[:, None]
    loss = largest[:, 0] + sums.log() - (1 - smoothing) * of_label
    if total is not None:
        loss = loss - smoothing / words * total
        gradient -= smoothing * weight.mean(0, dtype=wide)
    return loss.sum(), gradient


def _exponentiate(logits: Tensor, largest: Tensor, tile: int) -> Tensor:
    """Put `exp(z - max z)` in place of the logits `(rows, vocabulary)`; gives the sums over the vocabulary, `(rows,)`."""
    count, words = logits.shape
    sums = torch.zeros(count, dtype=largest.dtype, device=logits.device)
    width = max(tile // count, 1)
    memory = torch.empty(count, min(width, words), dtype=largest.dtype, device=logits.device)
    for start in range(0, words, width):
        part = logits[:, start : start + width]
        exponentials = memory[:, : part.shape[1]].copy_(part).sub_(largest).clamp_(min=LEAST).mul_(LOG2_E).exp2_()
        sums += exponentials.sum(1)
        part.copy_(exponentials)
    return sums
