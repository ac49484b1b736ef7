"""LoRA: a trained low-rank change beside each frozen weight.

    y = W x + b + s B A dropout(x),   s = alpha / r   (rsLoRA: alpha / sqrt(r))

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685 (section 4.1);
rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732. Its configuration is `lora_config.py`, the factors themselves
`lora_factors.py`; variants of the mathematics are files of their own (`dora.py`, `lora_from_weight.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bases.view import BaseView
from ..kernels.decoded_linear import Decoded
from ..kernels.dropout import dropout
from ..kernels.lora_linear import applies, lora_linear
from ..registry import register
from .lora_config import LoraConfig
from .lora_factors import LoraFactors


@register(LoraConfig)
class Lora(LoraFactors):
    """The call of one module with LoRA on it."""

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        weight = self._weight_to_fuse(x, base)
        if weight is None:
            y = base(x, *args, **kwargs)
            return y + self.change(self._inputs(x, base, y.dtype), base, y.dtype)
        return lora_linear(x, weight, base.bias, self.lora_A, self.lora_B, self.scale)

    def _weight_to_fuse(self, x: Tensor, base: BaseView) -> Tensor | Decoded | None:
        """The base's weight where base and change can be one step of autograd; None where not, or where it would not pay."""
        drops = self.training and self.dropout.p > 0
        few = x.numel() < self.lora_A.numel() and not torch.is_grad_enabled()
        if not base.is_plain or drops or self.lora_B_bias is not None or few:
            return None
        weight: Tensor | Decoded = base.operand(x.dtype)
        return weight if applies(x, weight, base.bias) else None

    def _inputs(self, x: Tensor, base: BaseView, dtype: torch.dtype) -> Tensor:
        """What the change gets to see: token ids as they are, other inputs dropped out."""
        if base.tokens_in:
            return x
        drops = self.training and self.dropout.p > 0
        return dropout(x.to(dtype), self.dropout.p) if drops else x.to(dtype)

    def change(self, x: Tensor, base: BaseView, dtype: torch.dtype) -> Tensor:
        """`s (B A x + b)`."""
        up = self.product(x, self.lora_A, self.lora_B, base, dtype)
        if self.lora_B_bias is None:
            return up
        return up + base.per_output(self.lora_B_bias.to(dtype) * self.scale)

    def product(self, x: Tensor, a: Tensor, b: Tensor, base: BaseView, dtype: torch.dtype) -> Tensor:
        """`s B A x` in `dtype`; few inputs are computed in the factors' wider type, because they are less to convert."""
        few = not base.tokens_in and x.numel() < a.numel()
        inner = torch.promote_types(a.dtype, dtype) if few else dtype
        down = base.down(x.to(inner) if few else x, a.to(inner))  # (..., r)
        return base.up(down * self.scale, b.to(inner)).to(dtype)
