"""LoRA: a trained low-rank change beside each frozen weight.

    y = W x + b + s B A dropout(x),   s = alpha / r   (rsLoRA: alpha / sqrt(r))

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685 (section 4.1);
rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732. Its configuration is `lora_config.py`; variants of the
mathematics are files of their own (`dora.py`, `lora_from_weight.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import LinearAdapter
from ..bases.view import BaseView
from ..config import PeftConfig
from ..inits.orthogonal import orthogonal
from ..kernels.dropout import dropout
from ..kernels.lora_linear import applies, lora_linear
from ..registry import register
from .lora_config import LoraConfig as LoraConfig


@register(LoraConfig)
class Lora(LinearAdapter):
    """LoRA's A and B for one module; shapes by the module's view, for a linear map A `(r, in)`, B `(out, r)`."""

    @classmethod
    def fault(cls, base: BaseView, config: PeftConfig, settings: dict[str, Any]) -> str | None:
        assert isinstance(config, LoraConfig)
        groups = getattr(base.module, "groups", 1)
        if settings["r"] % groups:
            return f"r={settings['r']} is not a multiple of its {groups} groups"
        if config.lora_bias and base.tokens_in:
            return "lora_bias=True is for modules that can have a bias; leave embeddings out of target_modules"
        if config.init_lora_weights == "orthogonal" and not base.is_matrix:
            return 'init_lora_weights="orthogonal" is for linear modules only; leave it out of target_modules'
        return None

    def __init__(self, base: BaseView, config: LoraConfig, settings: dict[str, Any]) -> None:
        super().__init__(base, config, settings)
        a_shape, b_shape = base.low_rank_shapes(settings["r"])
        self.scale: float = settings["scale"]
        self.init = config.init_lora_weights
        self.lora_A = nn.Parameter(torch.empty(a_shape))
        self.lora_B = nn.Parameter(torch.empty(b_shape))
        self.lora_B_bias = nn.Parameter(torch.zeros(b_shape[0])) if config.lora_bias else None
        self.dropout = nn.Dropout(config.lora_dropout)

    def reset_parameters(self, base: BaseView) -> None:
        """Start from no change: one factor is zero (for embeddings A, else B), unless `init_lora_weights=False`."""
        random, zero = (self.lora_B, self.lora_A) if base.tokens_in else (self.lora_A, self.lora_B)
        if self.init == "orthogonal":
            self._set_factors(*orthogonal(random.shape[1], zero.shape[0], random.shape[0]))
            return
        if base.tokens_in:
            nn.init.normal_(random)
        elif self.init == "gaussian":
            nn.init.normal_(random, std=1 / random.shape[0])
        else:
            nn.init.kaiming_uniform_(random, a=math.sqrt(5))
        nn.init.zeros_(zero)
        if self.init is False:
            nn.init.kaiming_uniform_(zero, a=math.sqrt(5))

    @torch.no_grad()
    def _set_factors(self, a: Tensor, b: Tensor) -> None:
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        drops = self.training and self.dropout.p > 0
        plain = base.is_plain and not drops and self.lora_B_bias is None
        few = x.numel() < self.lora_A.numel() and not torch.is_grad_enabled()
        if plain and not few and applies(x, weight := base.operand(x.dtype), base.bias):
            return lora_linear(x, weight, base.bias, self.lora_A, self.lora_B, self.scale)
        y = base(x, *args, **kwargs)
        return y + self.change(self._inputs(x, base, y.dtype), base, y.dtype)

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

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        change = base.compose(self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype))
        if self.lora_B_bias is not None:
            own = self.lora_B_bias.to(weight.dtype) * self.scale
            bias = own if bias is None else bias + own
        return weight + self.scale * change, bias

    def merge_fault(self, base: BaseView) -> str | None:
        if self.lora_B_bias is not None and base.bias is None:
            return "lora_bias=True trained a bias, but the module has none to merge it into; use the handle as it is"
        return base.compose_fault()
