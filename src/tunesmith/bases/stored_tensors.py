"""Tensors that are not what they seem: of a type nothing computes in, or placeholders whose values are elsewhere.

Weights in 8-bit floats are codes, decoded for each product. Accelerate's offloading leaves tensors on the "meta" device in a
module. ZeRO's stage 3 leaves tensors of shape `(0,)`, keeps the real shape in `ds_shape`, and gathers a module's values
around its call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

FLOAT8 = frozenset(
    getattr(torch, f"float8_{form}")
    for form in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
    if hasattr(torch, f"float8_{form}")
)


def computing_type(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in with values stored as `dtype`."""
    return torch.float32 if dtype in FLOAT8 else dtype


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO's stage 3 holds a tensor's values in parts, each with another process."""
    return hasattr(tensor, "ds_shape")


def is_placeholder(tensor: Tensor) -> bool:
    """Whether a tensor's values are not in it: offloaded, or partitioned and not gathered now."""
    return tensor.device.type == "meta" or (is_partitioned(tensor) and tensor.shape != tensor.ds_shape)  # type: ignore[attr-defined]


def shape_of(tensor: Tensor) -> torch.Size:
    """A tensor's shape, wherever its values are."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def whole(tensor: Tensor) -> Tensor:
    """A tensor itself, or a copy of its values where it is partitioned and DeepSpeed is there to gather it."""
    if not is_partitioned(tensor) or not is_placeholder(tensor):
        return tensor
    try:
        with gathered([tensor]):
            return tensor.detach().clone()
    except ImportError:
        return tensor


def copied(module: nn.Module) -> nn.Module:
    """A deep copy of a module, whose parameters are plain ones even where the module's are partitioned."""
    partitioned = [p for p in module.parameters() if is_partitioned(p)]
    with gathered(partitioned):
        plain: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in partitioned}
    return copy.deepcopy(module, plain)


def gathered(tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Inside, partitioned ones among these tensors hold their values, to be read; every process must enter."""
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not partitioned:
        return nullcontext()
    from deepspeed import zero

    context: AbstractContextManager[Any] = zero.GatheredParameters(partitioned)
    return context
