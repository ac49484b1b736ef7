"""OFT: frozen weights whose input is rotated block by block, so that angles between neurons stay as they are.

    y = W (R^T x) + b,   R = blockdiag(R_1 ... R_n),   R_i = (I - Q_i)(I + Q_i)^-1,   Q_i skew-symmetric (Cayley)

The inverse may be cut off as a Neumann series: R = I + 2Q + 2Q^2 + ... + Q^k, which starts the transposed Cayley map.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", https://arxiv.org/abs/2306.07280; with the
rotation of inputs and the series: Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", https://arxiv.org/abs/2506.19847.
"""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LinearAdapter
from ..bases.view import BaseView
from ..checks import not_finite, not_probability
from ..config import Settings, TargetedConfig, config_class
from ..kernels.fp32 import at_least_fp32
from ..registry import register
from .parts import wrong_bias
from .rotations import blockwise, cayley, convolved, some_unrotated

logger = logging.getLogger(__name__)


@config_class
class OFTConfig(TargetedConfig):
    """Configuration of OFT; give either `oft_block_size` or `r`, and 0 for the other.

    Args:
        r: number of blocks.
        oft_block_size: size of a block; where it does not divide a module's input, the nearest divisor is taken.
        module_dropout: probability of leaving a block unrotated in training.
        bias: "none", "oft_only" (biases of adapted modules) or "all" (every bias); trained as private copies.
        init_weights: True: no rotation at first; False: random rotations.
        coft: keep the norm of each Q below `eps / sqrt(blocks)`.
        eps: how far `coft` lets the rotation go.
        block_share: one block for all.
        use_cayley_neumann: a series instead of the inverse: faster, nearly orthogonal for small Q.
        num_cayley_neumann_terms: length of the series.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    method: ClassVar[str] = "OFT"
    usual_learning_rate: ClassVar[float] = 0.005

    def faults(self) -> list[str]:
        found = super().faults()
        if self.r < 0 or self.oft_block_size < 0 or (self.r > 0) == (self.oft_block_size > 0):
            found.append(
                f"r={self.r} and oft_block_size={self.oft_block_size}: exactly one must be above 0, because their product is "
                "a module's input size; set the other to 0"
            )
        if self.num_cayley_neumann_terms < 2:
            found.append(f"num_cayley_neumann_terms={self.num_cayley_neumann_terms} must be at least 2")
        if not self.eps > 0:
            found.append(f"eps={self.eps!r} must be above 0")
        found += not_finite({"eps": self.eps})
        found += not_probability({"module_dropout": self.module_dropout})
        return [*found, *wrong_bias(self.bias, "oft_only")]


@register(OFTConfig)
class OFT(LinearAdapter):
    """One module's blocks: the upper triangles of their Q, `(blocks, size * (size - 1) / 2)`."""

    @classmethod
    def fault(cls, base: BaseView, config: OFTConfig, settings: Settings) -> str | None:
        if getattr(base.module, "groups", 1) > 1:
            return "OFT cannot rotate the input channels of a grouped convolution; leave it out of target_modules"
        if _block_size(_width(base), config) < 2:
            return f"its input of {_width(base)} gives blocks of size 1, which cannot rotate; use another block size"
        return None

    def __init__(self, base: BaseView, config: OFTConfig, settings: Settings) -> None:
        super().__init__(base, config, settings)
        width = _width(base)
        self.size = _block_size(width, config)
        if width % (config.oft_block_size or config.r):
            logger.warning(
                "an input of %d is rotated in blocks of %d, the divisor nearest to the requested size", width, self.size
            )
        self.config = config
        self.on_embedding = base.tokens_in
        self.oft_R = nn.Parameter(
            torch.empty(1 if config.block_share else width // self.size, self.size * (self.size - 1) // 2)
        )

    def reset_parameters(self, base: BaseView) -> None:
        if self.config.init_weights:
            nn.init.zeros_(self.oft_R)
        else:
            nn.init.normal_(self.oft_R, std=0.1)

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        rotation = self._kept(self.rotation())
        if base.tokens_in:
            return blockwise(base(x, *args, **kwargs), rotation)
        if not base.is_matrix:
            return convolved(base, x, self._rotated_weight(base.weight(), rotation, base))
        return base(blockwise(x, rotation), *args, **kwargs)

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        return self._rotated_weight(weight, self.rotation(), base), bias

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        return {"oft_embedding_R.weight" if self.on_embedding else "oft_R.weight": self.oft_R}

    def rotation(self) -> Tensor:
        """The blocks R_i, `(blocks or 1, size, size)`, in at least fp32."""
        triangle = at_least_fp32(self._constrained())
        upper = torch.triu_indices(self.size, self.size, 1, device=triangle.device)
        skew = triangle.new_zeros(len(triangle), self.size, self.size)
        skew[:, upper[0], upper[1]] = triangle
        skew = skew - skew.mT
        if not self.config.use_cayley_neumann:
            return cayley(skew)
        # The ecosystem's series: powers below the last count twice; three and four terms give the same.
        last = {2: 1, 3: 3}.get(self.config.num_cayley_neumann_terms, self.config.num_cayley_neumann_terms - 1)
        total, power = torch.eye(self.size, device=skew.device, dtype=skew.dtype).expand_as(skew), skew
        for exponent in range(1, last + 1):
            total = total + (2 if exponent < max(last, 2) else 1) * power
            power = power @ skew
        return total

    def _constrained(self) -> Tensor:
        """The triangles, under `coft` with Q's norm cut off; training continues from the cut-off values."""
        if not self.config.coft:
            return self.oft_R
        with torch.no_grad():
            norm = self.oft_R.norm(dim=1, keepdim=True) * math.sqrt(2)  # of Q, which holds each number twice
            limit = self.config.eps / math.sqrt(len(self.oft_R))
            inside = self.oft_R * (limit / norm).clamp(max=1)
            if self.training:
                self.oft_R.copy_(inside)
        return self.oft_R + (inside - self.oft_R).detach()

    def _kept(self, rotation: Tensor) -> Tensor:
        if not (self.training and self.config.module_dropout) or len(rotation) == 1:
            return rotation
        return some_unrotated(rotation, self.config.module_dropout)

    def _rotated_weight(self, weight: Tensor, rotation: Tensor, base: BaseView) -> Tensor:
        turned = rotation if base.tokens_in else rotation.mT  # an embedding's output is rotated, else the input
        return blockwise(weight.flatten(1), turned).reshape(weight.shape)


def _width(base: BaseView) -> int:
    """The numbers that are rotated together: a module's input (with a convolution's kernel), an embedding's output."""
    return math.prod(base.shape[1:])


def _block_size(width: int, config: OFTConfig) -> int:
    """The wanted block size or count, else the divisor nearest to it, the smaller of two."""
    wanted = config.oft_block_size or config.r
    nearest = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: (abs(n - wanted), n))
    return nearest if config.oft_block_size else width // nearest
