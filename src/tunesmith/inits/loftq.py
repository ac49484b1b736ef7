"""LoftQ: a quantised weight and factors that make up for what quantising loses, found in turns.

    Q_t = quantise(W - s B_{t-1} A_{t-1}),   s B_t A_t = the r largest singular parts of W - Q_t

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", https://arxiv.org/abs/2310.08659
(algorithm 1); NormalFloat: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314 (appendix E).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pissa import pissa

BLOCK = 64  # values that share a scale


def loftq(weight: Tensor, r: int, scale: float, bits: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """A `(r, in)`, B `(out, r)` and the quantised weight, in the weight's own type; from the weight `(out, in)`."""
    change = torch.zeros_like(weight)
    for _ in range(rounds):
        quantised = quantise(weight - change, bits)
        a, b = pissa(weight - quantised, r, scale)
        change = scale * b @ a
    return a, b, quantised


def quantise(weight: Tensor, bits: int) -> Tensor:
    """The weight as it reads after storing: 8 bits as whole numbers per row, fewer as NormalFloat per block."""
    if bits == 8:
        step = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / 127
        return (weight / step).round() * step
    levels = normal_float(bits).to(weight)
    padding = -weight.numel() % BLOCK
    blocks = torch.nn.functional.pad(weight.flatten(), (0, padding)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    borders = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(blocks / largest, borders)] * largest
    return nearest.flatten()[: weight.numel()].view_as(weight)


def normal_float(bits: int) -> Tensor:
    """The `2^bits` levels in [-1, 1], zero among them, that a normal distribution fills about evenly."""
    half = 2 ** (bits - 1)
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2  # as NF4 was published, 0.9677
    positive = torch.special.ndtri(torch.linspace(0.5, outermost, half + 1, dtype=torch.float64))
    negative = -torch.special.ndtri(torch.linspace(0.5, outermost, half, dtype=torch.float64))
    levels = torch.cat([negative[1:].flip(0), positive])
    return (levels / levels.abs().max()).float()
