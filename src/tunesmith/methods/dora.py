"""DoRA: LoRA changes the direction of each output's weights, and a trained vector their size.

    W' = m * (W + s B A) / ||W + s B A||,   the norm over each output's weights; m starts as the norm, so W' as W

The norm is a constant to the gradient. It needs no B A: per output,
`||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>`.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353 (sections 4.1 and 4.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..bases.view import BaseView
from ..errors import TargetError
from ..kernels.fp32 import fp32_or_wider
from ..registry import register
from .lora import Lora
from .lora_config import LoraConfig, LoraSettings


@register(LoraConfig, flag="use_dora")
class Dora(Lora):
    """LoRA's factors and the sizes: `(out,)`, for convolutions `(1, out, 1, ...)`, for embeddings `(dim,)`."""

    @classmethod
    def fault(cls, base: BaseView, config: LoraConfig, settings: LoraSettings) -> str | None:
        if getattr(base.module, "groups", 1) > 1:
            return "DoRA needs the norm of the changed weight, which a low-rank change of a grouped convolution does not have"
        return super().fault(base, config, settings)

    def __init__(self, base: BaseView, config: LoraConfig, settings: LoraSettings) -> None:
        super().__init__(base, config, settings)
        out, spatial = self.lora_B.shape[0], self.lora_A.dim() - 2
        self.lora_magnitude_vector = nn.Parameter(torch.empty((1, out, *[1] * spatial) if spatial else (out,)))

    def reset_parameters(self, base: BaseView) -> None:
        super().reset_parameters(base)
        if base.module.weight.device.type == "meta" and hasattr(base.module, "_hf_hook"):
            raise TargetError("DoRA starts from its weights' norms, but they are offloaded; load the base without offloading")
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self.norm(base.weight(), base).view_as(self.lora_magnitude_vector))

    @torch.no_grad()
    def norm(self, weight: Tensor, base: BaseView) -> Tensor:
        """`||W + s B A||` per output, `(out,)`, in at least fp32."""
        wide = fp32_or_wider(weight.dtype)
        w = (weight.T if base.tokens_in else weight.flatten(1)).to(wide)  # (out, in)
        a = self.lora_A.flatten(1).to(wide)  # (r, in)
        b = self.scale * self.lora_B.flatten(1).to(wide)  # (out, r)
        mixed = ((2 * w @ a.T + b @ (a @ a.T)) * b).sum(1)
        return (w.square().sum(1) + mixed).clamp_min(0).sqrt()

    def factors(self, weight: Tensor, base: BaseView) -> Tensor:
        """`m / ||W + s B A||`, `(out,)`."""
        norm = self.norm(weight, base)
        return self.lora_magnitude_vector.flatten().to(norm.dtype) / norm

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        factors = base.per_output(self.factors(base.weight(), base))
        if self.training and self.dropout.p > 0 and not base.tokens_in:
            y = base(x, *args, **kwargs)
            inputs = self._inputs(x, base, y.dtype)
            plain = base.matmul(inputs)
            return y + (factors - 1).to(y.dtype) * plain + factors.to(y.dtype) * self.change(inputs, base, y.dtype)
        changed = super().forward(x, base, *args, **kwargs)  # W x + b + s B A x
        product = changed if base.bias is None else changed - base.per_output(base.bias)
        return torch.addcmul(changed, product, (factors - 1).to(changed.dtype))

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        factors = self.factors(weight, base).to(weight.dtype)
        changed, _ = super().merge(weight, bias, base)
        return changed * (factors if base.tokens_in else factors.view(-1, *[1] * (weight.dim() - 1))), bias
