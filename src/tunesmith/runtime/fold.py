"""A base module with the adapters of a call on it, as one callable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter, LinearAdapter, ModuleCopy, ParameterAdapter, SublayerAdapter
from ..bases.view import BaseView, plain_forward, view_type
from ..errors import UsageError
from .adapted import Adapted
from .frame import Around, Replacement


def fold(module: nn.Module, adapters: tuple[Adapter | Around | Replacement, ...]) -> Callable[..., Any]:
    """`module`'s forward with `adapters` on it, the first one innermost; those on its weights before those on its output."""
    for adapter in adapters:
        if isinstance(adapter, (ParameterAdapter, Replacement)):
            module = adapter(module)
    kind = view_type(module)
    base = None if kind is None else kind(module)
    call: Callable[..., Any]
    linear = [adapter for adapter in adapters if isinstance(adapter, LinearAdapter)]
    if linear:
        assert base is not None, f"no view for {type(module).__name__}"
        for adapter in linear[:-1]:
            base = Adapted(adapter, base)
        call = functools.partial(_adapted, linear[-1], base)
    else:
        call = plain_forward(module)
    for adapter in adapters:
        if isinstance(adapter, SublayerAdapter):
            call = functools.partial(_adapted_block, adapter, module, call)
        elif isinstance(adapter, (ModuleCopy, Around)):
            call = functools.partial(adapter, call)
    return call


def _adapted(adapter: LinearAdapter, base: BaseView, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return adapter(x, base, *args, **kwargs)


def _adapted_block(adapter: SublayerAdapter, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = call(*args, **kwargs)
    if isinstance(result, Tensor):
        return adapter(result, module, args, kwargs)
    if not isinstance(result, tuple):
        raise UsageError(
            f"{type(module).__name__} returned a {type(result).__name__}; {type(adapter).__name__} needs a tensor, alone or "
            "first in a tuple: leave this module out of target_modules"
        )
    return (adapter(result[0], module, args, kwargs), *result[1:])
