"""LoRA that starts from parts of the weight (PiSSA, OLoRA, LoftQ) on a base that stays as it is.

    PiSSA, OLoRA:   y = W x + s (B A - B_0 A_0) x     the factors start as (A_0, B_0), so the adapter starts as the base
    LoftQ:          y = Q x + s B A x                 with Q the quantised weight; Q - W is a frozen tensor of the adapter

The papers' other form puts `W - s B_0 A_0` (or Q) into the base, to the same effect. Files hold A and B alone, as the
ecosystem's do: what is frozen follows from the base and is computed anew when an adapter is loaded (`inits/`, where even
"pissa_niter_<rounds>" draws the same numbers each time). Other libraries draw others there, so files of that start move
between libraries up to the accuracy of the rounds; those of "pissa" and "olora" move exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bases.view import BaseView
from ..config import PeftConfig
from ..inits.loftq import loftq
from ..inits.olora import olora
from ..inits.pissa import pissa
from ..registry import register
from .lora import Lora, LoraConfig


@register(LoraConfig, flag="starts_from_weight")
class LoraFromWeight(Lora):
    """LoRA's factors, and the frozen ones they started as (LoftQ: the frozen difference `Q - W`)."""

    start_A: Tensor | None  # (r, in)
    start_B: Tensor | None  # (out, r)
    difference: Tensor | None  # (out, in)

    @classmethod
    def fault(cls, base: BaseView, config: PeftConfig, settings: dict[str, Any]) -> str | None:
        name, _ = settings["start"]
        if not base.is_matrix:
            return f'init_lora_weights="{name}" takes a linear module\'s weight apart; leave it out of target_modules'
        if base.module.weight.device.type == "meta":
            return f'init_lora_weights="{name}" needs the weight, which is offloaded; load the base without offloading'
        smaller = min(base.shape)
        if settings["r"] > smaller:
            return f'init_lora_weights="{name}" finds {smaller} parts in its weight, fewer than r={settings["r"]}'
        if settings["scale"] <= 0:
            return f'init_lora_weights="{name}" needs a positive lora_alpha'
        return super().fault(base, config, settings)

    def __init__(self, base: BaseView, config: LoraConfig, settings: dict[str, Any]) -> None:
        super().__init__(base, config, settings)
        self.start: tuple[str, dict[str, Any]] = settings["start"]
        for name in ("start_A", "start_B", "difference"):
            self.register_buffer(name, None, persistent=False)

    @torch.no_grad()
    def derive(self, base: BaseView) -> None:
        (name, options), weight, r = self.start, base.weight(), self.lora_A.shape[0]
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if name == "loftq":
            self.start_A, self.start_B, quantised = loftq(wide, r, self.scale, **options)
            self.difference = quantised - wide
        elif name == "olora":
            self.start_A, self.start_B = olora(wide, r)
        else:
            self.start_A, self.start_B = pissa(wide, r, self.scale, **options)

    def reset_parameters(self, base: BaseView) -> None:
        assert self.start_A is not None and self.start_B is not None
        self._set_factors(self.start_A, self.start_B)

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(x, base, *args, **kwargs)
        inputs = x.to(y.dtype)
        if self.difference is not None:
            return y + base.down(inputs, self.difference.to(y.dtype))
        assert self.start_A is not None and self.start_B is not None
        return y - self.product(inputs, self.start_A, self.start_B, base, y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        changed, bias = super().merge(weight, bias, base)
        if self.difference is not None:
            return changed + self.difference.to(weight.dtype), bias
        assert self.start_A is not None and self.start_B is not None
        return changed - self.scale * self.start_B.to(weight.dtype) @ self.start_A.to(weight.dtype), bias
