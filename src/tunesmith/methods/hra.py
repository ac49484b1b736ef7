"""HRA: frozen weights behind a chain of r Householder reflections: low-rank and orthogonal at once.

    y = W H x + b,   H = (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T) = I - U T U^T,   |u_i| = 1

T is upper triangular, T^-1 = I/2 + (the part of U^T U above its diagonal): r reflections cost one solve of r equations
(Joffrain et al. 2006, "Accumulating Householder transformations, revisited").

Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
https://arxiv.org/abs/2405.17484 (section 3).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LinearAdapter
from ..bases.view import BaseView
from ..checks import not_positive
from ..config import Settings, TargetedConfig, config_class
from ..kernels.fp32 import at_least_fp32
from ..registry import register
from .parts import not_linear_or_convolution, wrong_bias
from .rotations import convolved


@config_class
class HRAConfig(TargetedConfig):
    """Configuration of HRA.

    Args:
        r: number of reflections. If it is even, nothing changes at first: equal neighbours cancel out.
        apply_GS: make the vectors orthogonal to each other first (Gram-Schmidt); H = I - 2 U U^T, which is never the base.
        init_weights: True: neighbours are equal at first if `r` is even; False: independent random vectors.
        bias: "none", "hra_only" (biases of adapted modules) or "all" (every bias); trained as private copies.
    """

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: str = "none"

    method: ClassVar[str] = "HRA"
    usual_learning_rate: ClassVar[float] = 0.005
    ours_alone: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)

    def faults(self) -> list[str]:
        return [*super().faults(), *not_positive({"r": self.r}), *wrong_bias(self.bias, "hra_only")]


@register(HRAConfig)
class HRA(LinearAdapter):
    """One module's vectors, not normalised: `hra_u` `(in, r)`; a convolution's input counts its kernel."""

    @classmethod
    def fault(cls, base: BaseView, config: HRAConfig, settings: Settings) -> str | None:
        width = math.prod(base.shape[1:])
        if config.apply_GS and config.r > width:
            return f"r={config.r} vectors cannot be orthogonal in its input of {width}; use a smaller r"
        return not_linear_or_convolution(base, "HRA", groups=False)

    def __init__(self, base: BaseView, config: HRAConfig, settings: Settings) -> None:
        super().__init__(base, config, settings)
        self.orthogonal = config.apply_GS
        # Gram-Schmidt of equal vectors is 0/0, so they start in pairs only without it.
        self.starts_in_pairs = config.init_weights and config.r % 2 == 0 and not config.apply_GS
        self.hra_u = nn.Parameter(torch.empty(math.prod(base.shape[1:]), config.r))

    def reset_parameters(self, base: BaseView) -> None:
        nn.init.kaiming_uniform_(self.hra_u, a=math.sqrt(5))
        if self.starts_in_pairs:
            with torch.no_grad():
                self.hra_u[:, 1::2] = self.hra_u[:, ::2]

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        if not base.is_matrix:
            return convolved(base, x, self.merge(base.weight(), None, base)[0])
        u, t = self._reflections()
        u, t = u.to(x.dtype), t.to(x.dtype)
        return base(x - x @ u @ t.T @ u.T, *args, **kwargs)

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        u, t = self._reflections()
        u, t, flat = u.to(weight.dtype), t.to(weight.dtype), weight.flatten(1)
        return (flat - flat @ u @ t @ u.T).reshape(weight.shape), bias

    def _reflections(self) -> tuple[Tensor, Tensor]:
        """U `(in, r)` and T `(r, r)` of H = I - U T U^T, in at least fp32."""
        u = at_least_fp32(self.hra_u)
        one = torch.eye(u.shape[1], device=u.device, dtype=u.dtype)
        if self.orthogonal:
            return torch.linalg.qr(u).Q, 2 * one
        u = u / u.norm(dim=0)
        return u, torch.linalg.solve_triangular(one / 2 + (u.T @ u).triu(1), one, upper=True)
