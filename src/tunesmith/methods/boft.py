"""BOFT: OFT with a dense rotation made of m sparse ones, block-diagonal each, shuffled as in a fast Fourier transform.

    y = s * W (B^T x) + b,   B = (P_m R_m P_m^T) ... (P_1 R_1 P_1^T),   R_i = blockdiag(Cayley maps),   P_i permutations

Liu et al. 2024, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", https://arxiv.org/abs/2311.06243
(sections 4 and 5).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LinearAdapter
from ..bases.view import BaseView
from ..checks import not_positive, not_probability
from ..config import Settings, TargetedConfig, config_class
from ..kernels.fp32 import at_least_fp32
from ..registry import register
from .parts import not_linear_or_convolution, wrong_bias
from .rotations import blockwise, cayley, convolved, some_unrotated


@config_class
class BOFTConfig(TargetedConfig):
    """Configuration of BOFT; give either `boft_block_size` or `boft_block_num`, and 0 for the other.

    Args:
        boft_block_size: size of a block; it must divide every adapted module's input.
        boft_block_num: number of blocks of a factor.
        boft_n_butterfly_factor: number of factors m; each doubles how many inputs an output mixes. 1 is OFT with a scale.
        boft_dropout: probability of leaving a block unrotated in training.
        bias: "none", "boft_only" (biases of adapted modules) or "all" (every bias); trained as private copies.
        init_weights: True: no change at first; False: random rotations and scales.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True

    method: ClassVar[str] = "BOFT"
    usual_learning_rate: ClassVar[float] = 0.005

    def faults(self) -> list[str]:
        found = super().faults()
        size, count = self.boft_block_size, self.boft_block_num
        if size < 0 or count < 0 or (size > 0) == (count > 0):
            found.append(
                f"boft_block_size={size} and boft_block_num={count}: exactly one must be above 0, because their product is a "
                "module's input size; set the other to 0"
            )
        found += not_positive({"boft_n_butterfly_factor": self.boft_n_butterfly_factor})
        found += not_probability({"boft_dropout": self.boft_dropout})
        return [*found, *wrong_bias(self.bias, "boft_only")]


@register(BOFTConfig)
class BOFT(LinearAdapter):
    """One module's rotations `boft_R` `(m, blocks, size, size)` and scales `boft_s` `(out, 1)`, a convolution's `(1, out)`."""

    @classmethod
    def fault(cls, base: BaseView, config: BOFTConfig, settings: Settings) -> str | None:
        reason = not_linear_or_convolution(base, "BOFT", groups=False)
        width, factors = math.prod(base.shape[1:]), config.boft_n_butterfly_factor
        wanted = config.boft_block_size or config.boft_block_num
        if reason or width % wanted:
            return reason or f"its input of {width} is not a multiple of {wanted} (boft_block_size or boft_block_num)"
        size, count = _blocks(width, config)
        if factors > 1 and (size % 2 or count % 2 ** (factors - 1)):
            return (
                f"{count} blocks of {size} cannot be shuffled {factors - 1} times: boft_n_butterfly_factor={factors} needs "
                f"blocks of an even size, and a multiple of {2 ** (factors - 1)} of them"
            )
        return None

    def __init__(self, base: BaseView, config: BOFTConfig, settings: Settings) -> None:
        super().__init__(base, config, settings)
        out, *inner = base.shape
        self.size, count = _blocks(math.prod(inner), config)
        self.dropout, self.init_weights = config.boft_dropout, config.init_weights
        self.boft_R = nn.Parameter(torch.empty(config.boft_n_butterfly_factor, count, self.size, self.size))
        self.boft_s = nn.Parameter(torch.empty((out, 1) if len(inner) == 1 else (1, out)))

    def reset_parameters(self, base: BaseView) -> None:
        if self.init_weights:
            nn.init.zeros_(self.boft_R)
            nn.init.ones_(self.boft_s)
        else:
            nn.init.normal_(self.boft_R, std=0.1)
            nn.init.normal_(self.boft_s, mean=1.0, std=0.1)

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        rotations = self._kept(self._rotations())
        if not base.is_matrix:
            return convolved(base, x, self._mapped(base.weight(), rotations))
        scale, bias = self.boft_s.flatten().to(x.dtype), base.bias
        for shuffles in reversed(range(len(rotations))):
            x = _through_factor(x, rotations[shuffles].to(x.dtype), shuffles)
        y = base(x, *args, **kwargs) * scale
        return y if bias is None else y + bias * (1 - scale)  # the bias itself is not scaled

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        return self._mapped(weight, self._rotations()), bias

    def _mapped(self, weight: Tensor, rotations: Tensor) -> Tensor:
        """The weight W B^T with its rows scaled: the factors transposed, the first one first."""
        flat = weight.flatten(1)
        for shuffles, blocks in enumerate(rotations.to(weight.dtype)):
            flat = _through_factor(flat, blocks.mT, shuffles)
        return (flat * self.boft_s.to(weight.dtype).view(-1, 1)).reshape(weight.shape)

    def _rotations(self) -> Tensor:
        """The blocks' Cayley maps, `(m, blocks, size, size)`, in at least fp32."""
        values = at_least_fp32(self.boft_R)
        return cayley((values - values.mT) / 2)

    def _kept(self, rotations: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return rotations
        return some_unrotated(rotations, self.dropout)


def _through_factor(x: Tensor, blocks: Tensor, shuffles: int) -> Tensor:
    """`x P R P^T`: half blocks, sorted by even and odd within 2^shuffles blocks, are put in order, rotated, and put back."""
    size = blocks.shape[-1]
    if shuffles:
        x = x.unflatten(-1, (-1, 2, 2**shuffles, size // 2)).transpose(-3, -2).flatten(-4)
    x = blockwise(x, blocks)
    if shuffles:
        x = x.unflatten(-1, (-1, 2**shuffles, 2, size // 2)).transpose(-3, -2).flatten(-4)
    return x


def _blocks(width: int, config: BOFTConfig) -> tuple[int, int]:
    """Size and number of the blocks of a rotation of `width` numbers."""
    size = config.boft_block_size or width // config.boft_block_num
    return size, width // size
