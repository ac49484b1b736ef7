"""LoKr: the change is the Kronecker product of a small and a larger matrix, the larger one low-rank where that is cheaper.

    y = W x + b + s (C kron D) x,   C in R^{out1 x in1},  D in R^{out2 x in2},  out = out1 out2,  in = in1 in2,  s = alpha / r

Yeh et al. 2024, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
https://arxiv.org/abs/2309.14859 (section 3.3).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bases.view import BaseView
from ..config import config_class
from ..registry import register
from .lycoris import LycorisAdapter, LycorisConfig, core_shape, through_kernel
from .parts import RankSettings


@config_class
class LoKrConfig(LycorisConfig):
    """Configuration of LoKr, besides the fields of `LycorisConfig`.

    Args:
        decompose_both: the smaller factor may be low-rank, too.
        decompose_factor: wanted size of the smaller factor; -1 splits as evenly as possible.
        rank_dropout_scale: with `rank_dropout`, scale the kept rows up.
        init_weights: True (no change: the smaller factor is zero), "lycoris" (no change: the larger one is) or False
            (random).
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    method: ClassVar[str] = "LOKR"
    usual_learning_rate: ClassVar[float] = 0.005

    def faults(self) -> list[str]:
        found = super().faults()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            found.append(f"decompose_factor={self.decompose_factor!r} must be -1 or at least 1")
        if self.init_weights not in (True, False, "lycoris"):
            found.append(f'init_weights={self.init_weights!r} must be True, False or "lycoris"')
        return found


@register(LoKrConfig)
class LoKr(LycorisAdapter):
    """One module's factors `lokr_w1` `(out1, in1)` and `lokr_w2` `(out2, in2, ...)`, or `..._a` and `..._b` in their place."""

    def __init__(self, base: BaseView, config: LoKrConfig, settings: RankSettings) -> None:
        super().__init__(base, config, settings)
        self.init_weights = config.init_weights
        r, (out, inner, *kernel) = settings.r, base.shape
        out1, out2 = factorised(out, config.decompose_factor)
        in1, self.in2 = factorised(inner, config.decompose_factor)
        self.kernel = tuple(kernel)
        if config.decompose_both and r < max(out1, in1) / 2:
            self.lokr_w1_a, self.lokr_w1_b = _empty(out1, r), _empty(r, in1)
        else:
            self.lokr_w1 = _empty(out1, in1)
        if r >= max(out2, self.in2) / 2:
            self.lokr_w2 = _empty(out2, self.in2, *kernel)
        elif config.use_effective_conv2d and math.prod(kernel) > 1:
            self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2 = _empty(r, out2), _empty(r, self.in2), _empty(*core_shape(r, kernel))
        else:
            self.lokr_w2_a, self.lokr_w2_b = _empty(out2, r), _empty(r, self.in2 * math.prod(kernel))

    def reset_parameters(self, base: BaseView) -> None:
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[self.init_weights]
        for name, parameter in self.named_parameters():
            if name in zero:
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def product(self, x: Tensor, base: BaseView) -> Tensor:
        if self.kernel:
            return super().product(x, base)
        parts = x.unflatten(-1, (-1, self.in2))  # (..., in1, in2)
        if "lokr_w2" in self._parameters:
            parts = parts @ self.lokr_w2.to(x.dtype).T
        else:
            parts = parts @ self.lokr_w2_b.to(x.dtype).T @ self.lokr_w2_a.to(x.dtype).T  # (..., in1, out2)
        return F.linear(parts.mT.contiguous(), self._smaller().to(x.dtype)).mT.flatten(-2)  # (..., out1 * out2)

    def change(self, base: BaseView) -> Tensor:
        smaller, larger = self._smaller(), self._larger()
        if len(self.kernel) == 1 and "lokr_w2" in self._parameters:
            return torch.kron(smaller, larger).reshape(base.shape)  # along other axes, as the ecosystem's files mean it
        return torch.kron(smaller.reshape(*smaller.shape, *(1 for _ in self.kernel)), larger)

    def _smaller(self) -> Tensor:
        return self.lokr_w1 if "lokr_w1" in self._parameters else self.lokr_w1_a @ self.lokr_w1_b

    def _larger(self) -> Tensor:
        if "lokr_w2" in self._parameters:
            return self.lokr_w2
        if "lokr_t2" in self._parameters:
            return through_kernel(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b).flatten(2).unflatten(2, self.kernel)
        return (self.lokr_w2_a @ self.lokr_w2_b).unflatten(-1, (self.in2, *self.kernel))


def factorised(size: int, wanted: int) -> tuple[int, int]:
    """`size` as a product of two: `wanted` first where it divides, else the largest divisor up to `wanted` and the root."""
    if wanted > 0 and size % wanted == 0:
        return wanted, size // wanted
    limit = math.isqrt(size) if wanted < 0 else min(wanted, math.isqrt(size))
    first = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return first, size // first


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))
