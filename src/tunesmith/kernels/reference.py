"""Reference implementations: what each fused operation computes, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .decoded_linear import Decoded


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum over rows of the cross-entropy of `hidden @ weight.T + bias` with `labels`, in fp32.

    With smoothing e the target is `(1 - e) onehot(label) + e / V` (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567).
    """
    logits = F.linear(hidden, weight, bias)
    wide = logits.double() if logits.dtype.itemsize == 8 else logits.float()
    return F.cross_entropy(wide, labels, reduction="sum", label_smoothing=smoothing)


def decoded_linear(x: Tensor, weight: Decoded, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` of the decoded weight, which autograd then keeps."""
    return F.linear(x, weight(), bias)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`x W^T + bias + scale x A^T B^T` with the factors rounded to x's type (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype) * scale)
