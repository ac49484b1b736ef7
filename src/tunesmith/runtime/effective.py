"""What a module's parameters are with the adapters of a frame on them, for code that reads a weight instead of calling the module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..adapter import LinearAdapter, ModuleCopy, ParameterAdapter
from ..bases.view import BaseView, view_of
from .adapted import Adapted


def effective(module: nn.Module, adapters: tuple[Any, ...]) -> dict[str, Tensor]:
    """`{parameter or buffer: value}` of what these adapters change; gradients reach the adapters.

    The weight of a linear map is the merged one, `W + s B A` for LoRA, as the module stores it.
    """
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        if isinstance(adapter, (ParameterAdapter, ModuleCopy)):
            found.update(adapter.replaced(module))
    linear = [adapter for adapter in adapters if isinstance(adapter, LinearAdapter)]
    if linear:
        view: BaseView = view_of(module)
        base = view
        for adapter in linear:
            base = Adapted(adapter, base)
        found["weight"] = view.stored(base.weight())
        if base.bias is not None:
            found["bias"] = base.bias
    return found
