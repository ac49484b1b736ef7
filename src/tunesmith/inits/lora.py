"""LoRA's own init: one factor random, the other zero, so that the change is zero at first.

    A ~ U(-1/sqrt(in), 1/sqrt(in))  ("gaussian": A ~ N(0, 1/r^2)),   B = 0

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685 (section 4.1). The
uniform form is PyTorch's of a linear layer, as in the authors' code. Embeddings have it the other way round: A is zero,
B normal.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


def init_factors(a: Tensor, b: Tensor, init: bool | str, r: int, embedding: bool = False) -> None:
    """Draw A and B in place.

    Args:
        a, b: of the change's shape, A `(r, in, ...)` and B `(out, r, ...)`; stacked for several experts.
        init: True, "gaussian", or False, which draws both factors at random: the change is not zero at first.
        embedding: the module is a table, so that B is the random factor.
    """
    random, zero = (b, a) if embedding else (a, b)
    if embedding:
        nn.init.normal_(random)
    elif init == "gaussian":
        nn.init.normal_(random, std=1 / r)
    else:
        nn.init.kaiming_uniform_(random, a=math.sqrt(5))
    nn.init.zeros_(zero)
    if init is False:
        nn.init.kaiming_uniform_(zero, a=math.sqrt(5))
