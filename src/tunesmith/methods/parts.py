"""What several methods share: values per module, and checks of configurations and modules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..bases.view import BaseView


def by_pattern(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first key that matches the end of `path` at a dot, as a regular expression."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def with_pattern(name: str, value: Any, pattern: dict[str, Any] | None, pattern_name: str) -> dict[str, Any]:
    """`{how the user spells it: value}` of a field and of the pattern that overrides it."""
    return {name: value, **{f'{pattern_name}["{key}"]': each for key, each in (pattern or {}).items()}}


def ranks_below_one(ranks: dict[str, int]) -> Iterator[str]:
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            yield f"{name}={rank!r} must be a whole number of at least 1"


def not_finite(values: dict[str, float]) -> Iterator[str]:
    for name, value in values.items():
        if not math.isfinite(value):
            yield f"{name}={value!r} must be a finite number"


def no_probabilities(values: dict[str, float]) -> Iterator[str]:
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            yield f"{name}={value!r} must be at least 0 and below 1"


def wrong_bias(bias: str, own: str) -> Iterator[str]:
    if bias not in ("none", "all", own):
        yield f'bias={bias!r} must be "none", "all" or "{own}"'


def not_linear(base: BaseView, method: str) -> str | None:
    """Why `method`, which adapts linear modules only, cannot sit on this one; None where it can."""
    if base.tokens_in or len(base.shape) != 2:
        return f"{method} adapts linear modules only; leave it out of target_modules"
    return None


def no_weight_map(base: BaseView, method: str, groups: bool = True) -> str | None:
    """Why `method`, which maps the weights of linear modules and convolutions, cannot sit on this one."""
    if base.tokens_in:
        return f"{method} adapts linear modules and convolutions, not embeddings; leave it out of target_modules"
    if not groups and getattr(base.module, "groups", 1) > 1:
        return f"{method} cannot map the input channels of a grouped convolution; leave it out of target_modules"
    return None


def at_least_fp32(tensor: Tensor) -> Tensor:
    """`tensor` in a type that is precise enough for solving and orthogonalising."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def blockwise(x: Tensor, matrices: Tensor) -> Tensor:
    """Each block of the last dimension of `x` times its own of the matrices `(blocks, size, size)`, or times the only one."""
    blocks, matrices = x.unflatten(-1, (-1, matrices.shape[-1])), matrices.to(x.dtype)
    if len(matrices) == 1:
        return (blocks @ matrices[0]).flatten(-2)
    return torch.einsum("...bi,bij->...bj", blocks, matrices).flatten(-2)  # a broadcast `@` would copy them for every row


def convolved(base: BaseView, x: Tensor, weight: Tensor) -> Tensor:
    """A convolution's output with another weight in place of its own."""
    y = base.product(x, weight.to(x.dtype))
    return y if base.bias is None else y + base.bias.to(y.dtype)[:, None, None]
