"""Activations that models spell out in several passes over memory, each of which is one kernel of torch.

    gelu_tanh(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

The reference is the model's own forward. In 16 bits the kernel rounds once, the model after every pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_gelu_tanh = functools.partial(F.gelu, approximate="tanh")

ONE_KERNEL: dict[str, Callable[[Tensor], Tensor]] = {  # by the class's name in transformers
    "BloomGelu": _gelu_tanh,
    "FastGELUActivation": _gelu_tanh,
    "NewGELUActivation": _gelu_tanh,
}


def one_kernel(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The kernel that computes what this activation does; None where there is none, or it is one already."""
    known: Any = type(module).__module__.startswith("transformers.")
    return ONE_KERNEL.get(type(module).__name__) if known else None
