"""LoRA that starts from parts of the weight (PiSSA, OLoRA, LoftQ) on a base that stays as it is.

    PiSSA, OLoRA:   y = W x + s (B A - B_0 A_0) x     the factors start as (A_0, B_0), so the adapter starts as the base
    LoftQ:          y = Q x + s B A x                 with Q the quantised weight; Q - W is a frozen tensor of the adapter

The papers' other form puts `W - s B_0 A_0` (or Q) into the base, to the same effect. Files hold A and B alone, as the
ecosystem's do: what is frozen follows from the base and is recomputed when an adapter is loaded (`inits/`, where even
"pissa_niter_<rounds>" draws the same numbers each time). Other libraries draw others there, so files of that init move
between libraries up to the accuracy of the rounds; those of "pissa" and "olora" move exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bases.view import BaseView
from ..inits.loftq import loftq
from ..inits.olora import olora
from ..inits.pissa import pissa
from ..kernels.fp32 import at_least_fp32
from ..registry import register
from .lora import Lora
from .lora_config import LoraConfig, LoraSettings


@register(LoraConfig, flag="init_from_weight")
class LoraFromWeight(Lora):
    """LoRA's factors, and the frozen ones they started as (LoftQ: the frozen difference `Q - W`)."""

    init_A: Tensor | None  # (r, in)
    init_B: Tensor | None  # (out, r)
    difference: Tensor | None  # (out, in)

    @classmethod
    def fault(cls, base: BaseView, config: LoraConfig, settings: LoraSettings) -> str | None:
        assert settings.init is not None
        name = settings.init.name
        if not base.is_matrix:
            return (
                f'init_lora_weights="{name}" decomposes the weight of a linear module; leave this module out of target_modules'
            )
        if base.module.weight.device.type == "meta":
            return f'init_lora_weights="{name}" needs the weight, but it is offloaded; load the base without offloading'
        smaller = min(base.shape)
        if settings.r > smaller:
            return f'init_lora_weights="{name}" allows at most r={smaller} for its weight, got r={settings.r}'
        if settings.scale <= 0:
            return f'init_lora_weights="{name}" needs a positive lora_alpha'
        return super().fault(base, config, settings)

    def __init__(self, base: BaseView, config: LoraConfig, settings: LoraSettings) -> None:
        super().__init__(base, config, settings)
        self.weight_init = settings.init
        for name in ("init_A", "init_B", "difference"):
            self.register_buffer(name, None, persistent=False)

    @torch.no_grad()
    def derive(self, base: BaseView) -> None:
        init, weight, r = self.weight_init, at_least_fp32(base.weight()), self.lora_A.shape[0]
        assert init is not None
        if init.name == "loftq":
            assert init.bits is not None and init.rounds is not None
            self.init_A, self.init_B, quantised = loftq(weight, r, self.scale, init.bits, init.rounds)
            self.difference = quantised - weight
        elif init.name == "olora":
            self.init_A, self.init_B = olora(weight, r)
        else:
            self.init_A, self.init_B = pissa(weight, r, self.scale, init.rounds)

    def reset_parameters(self, base: BaseView) -> None:
        assert self.init_A is not None and self.init_B is not None
        self._set_factors(self.init_A, self.init_B)

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(x, base, *args, **kwargs)
        inputs = x.to(y.dtype)
        if self.difference is not None:
            return y + base.down(inputs, self.difference.to(y.dtype))
        assert self.init_A is not None and self.init_B is not None
        return y - self.product(inputs, self.init_A, self.init_B, base, y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        changed, bias = super().merge(weight, bias, base)
        if self.difference is not None:
            return changed + self.difference.to(weight.dtype), bias
        assert self.init_A is not None and self.init_B is not None
        return changed - self.scale * self.init_B.to(weight.dtype) @ self.init_A.to(weight.dtype), bias
