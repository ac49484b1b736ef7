"""What LoHa and LoKr share: ranks and strengths by pattern, and dropping rows of the change while training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapter import LinearAdapter
from ..bases.view import BaseView
from ..checks import not_finite, not_positive, not_probability
from ..config import TargetedConfig, config_class
from .parts import RankSettings, by_pattern, not_linear_or_convolution, with_pattern


@config_class
class LycorisConfig(TargetedConfig):
    """Fields that the configurations of LoHa and LoKr share.

    Args:
        r: rank.
        alpha: strength; the change is scaled by `alpha / r`.
        rank_dropout: probability of dropping a row (an output feature) of the change while training.
        module_dropout: probability of dropping a module's whole change while training.
        use_effective_conv2d: a decomposition of larger convolution kernels with fewer parameters.
        rank_pattern, alpha_pattern: `{name ending or regular expression: value}` for single modules.
    """

    r: int = 8
    alpha: int | float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int | float] | None = None

    ours_alone: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)

    def __post_init__(self) -> None:
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        super().__post_init__()

    def faults(self) -> list[str]:
        return [
            *super().faults(),
            *not_positive(with_pattern("r", self.r, self.rank_pattern, "rank_pattern")),
            *not_finite(with_pattern("alpha", self.alpha, self.alpha_pattern, "alpha_pattern")),
            *not_probability({"rank_dropout": self.rank_dropout, "module_dropout": self.module_dropout}),
        ]

    def settings(self, path: str) -> RankSettings:
        r = by_pattern(self.rank_pattern, path, self.r)
        return RankSettings(r, scale=by_pattern(self.alpha_pattern, path, self.alpha) / r)

    def pattern_keys(self) -> dict[str, list[str]]:
        return {"rank_pattern": list(self.rank_pattern or ()), "alpha_pattern": list(self.alpha_pattern or ())}


class LycorisAdapter(LinearAdapter):
    """`y = W x + b + s D x`, where `product(x, base)` is `D x` and `change(base)` is the dense D."""

    @classmethod
    def fault(cls, base: BaseView, config: LycorisConfig, settings: RankSettings) -> str | None:
        return not_linear_or_convolution(base, cls.__name__)

    def __init__(self, base: BaseView, config: LycorisConfig, settings: RankSettings) -> None:
        super().__init__(base, config, settings)
        self.scale = settings.scale
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.rescales = getattr(config, "rank_dropout_scale", False)

    def change(self, base: BaseView) -> Tensor:
        """The dense change in the shape of `base.weight()`, unscaled, in the adapter's own type."""
        raise NotImplementedError

    def product(self, x: Tensor, base: BaseView) -> Tensor:
        return base.product(x, self.change(base).to(x.dtype))

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        product = self.product(x.to(y.dtype), base) * self.scale
        if self.training and (self.rank_dropout or self.module_dropout):
            product = product * base.per_output(self._kept(base.shape[0], y))
        return y + product

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * self.change(base).to(weight.dtype), bias

    def _kept(self, out: int, y: Tensor) -> Tensor:
        """A random factor for each of y's output features that zeroes dropped ones, `(out,)`."""
        kept = (torch.rand(out, device=y.device) >= self.rank_dropout).to(y.dtype)  # (out,)
        if self.rescales:
            kept = kept / kept.mean().clamp(min=1 / out)
        return kept * (torch.rand(1, device=y.device) >= self.module_dropout)


def core_shape(r: int, kernel: Sequence[int]) -> tuple[int, ...]:
    """Of a kernel's core, `(r, r, *kernel)`; the ecosystem's files give the only dimension of a Conv1d a second one of 1."""
    return r, r, *kernel, *(1 for _ in range(2 - len(kernel)))


def through_kernel(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`(out, in, *kernel)` of the core `(r, r, *kernel)`, `a` `(r, out)` and `b` `(r, in)` (FedPara, proposition 3)."""
    return torch.einsum("rs...,ro,si->oi...", core, a, b)
