"""LoHa: the change is the elementwise product of two low-rank matrices, so its rank reaches r^2.

    y = W x + b + s ((A1 B1) * (A2 B2)) x,   s = alpha / r

Nam, Lee, Hwang 2022, "FedPara: Low-rank Hadamard Product for Communication-Efficient Federated Learning",
https://arxiv.org/abs/2108.06098 (propositions 1 and 3); LyCORIS: Yeh et al. 2024, https://arxiv.org/abs/2309.14859.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..bases.view import BaseView
from ..config import config_class
from ..registry import register
from .lycoris import LycorisAdapter, LycorisConfig, core_shape, through_kernel
from .parts import RankSettings


@config_class
class LoHaConfig(LycorisConfig):
    """Configuration of LoHa, besides the fields of `LycorisConfig`.

    Args:
        init_weights: True: no change at first (one factor is zero); False: random factors.
    """

    init_weights: bool = True

    method: ClassVar[str] = "LOHA"
    usual_learning_rate: ClassVar[float] = 0.005


@register(LoHaConfig)
class LoHa(LycorisAdapter):
    """One module's factors: a `(out, r)` and b `(r, in)`; with kernel cores t `(r, r, *kernel)`: a `(r, out)`, b `(r, in)`."""

    def __init__(self, base: BaseView, config: LoHaConfig, settings: RankSettings) -> None:
        super().__init__(base, config, settings)
        self.init_weights = config.init_weights
        r, (out, inner, *kernel) = settings.r, base.shape
        self.has_cores = config.use_effective_conv2d and math.prod(kernel) > 1
        a_shape, b_shape = ((r, out), (r, inner)) if self.has_cores else ((out, r), (r, inner * math.prod(kernel)))
        self.hada_w1_a, self.hada_w1_b = nn.Parameter(torch.empty(a_shape)), nn.Parameter(torch.empty(b_shape))
        self.hada_w2_a, self.hada_w2_b = nn.Parameter(torch.empty(a_shape)), nn.Parameter(torch.empty(b_shape))
        if self.has_cores:
            self.hada_t1 = nn.Parameter(torch.empty(core_shape(r, kernel)))
            self.hada_t2 = nn.Parameter(torch.empty(core_shape(r, kernel)))

    def reset_parameters(self, base: BaseView) -> None:
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if self.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def change(self, base: BaseView) -> Tensor:
        if self.has_cores:
            first = through_kernel(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            second = through_kernel(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        else:
            first, second = self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b
        return (first * second).reshape(base.shape)
