"""A base module with the adapters of a call on it, as one callable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, LinearAdapter, ModuleCopy, ParameterAdapter, SublayerAdapter
from ..bases.view import BaseView, plain_forward, view_of, view_type
from ..errors import UsageError
from .frame import Around, Replacement


class Adapted(BaseView):
    """A view with an adapter on it, which is a view again: what the next adapter sees as its base."""

    def __init__(self, adapter: LinearAdapter, base: BaseView) -> None:
        super().__init__(base.module)
        self.adapter = adapter
        self.base = base
        self.tokens_in = base.tokens_in  # type: ignore[misc]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter(x, self.base, *args, **kwargs)

    def weight(self) -> Tensor:
        return self.adapter.merge(self.base.weight(), self.base.bias, self.base)[0]

    @property
    def bias(self) -> Tensor | None:
        return self.adapter.merge(self.base.weight(), self.base.bias, self.base)[1]

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def output_scale(self) -> Any:
        return self.base.output_scale

    def matmul(self, x: Tensor) -> Tensor:
        y, bias = self(x), self.bias
        return y if bias is None else y - bias

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.base.product(x, weight)

    def stored(self, weight: Tensor) -> Tensor:
        return self.base.stored(weight)

    def low_rank_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.base.low_rank_shapes(r)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self.base.down(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return self.base.up(h, b)

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        return self.base.compose(a, b)

    def per_output(self, values: Tensor) -> Tensor:
        return self.base.per_output(values)


def fold(module: nn.Module, adapters: tuple[Adapter | Around | Replacement, ...]) -> Callable[..., Any]:
    """`module`'s forward with `adapters` on it, the first one innermost; those on its weights before those on its output."""
    for adapter in adapters:
        if isinstance(adapter, (ParameterAdapter, Replacement)):
            module = adapter(module)
    call: Callable[..., Any] = view_of(module) if view_type(module) else plain_forward(module)
    for adapter in adapters:
        if isinstance(adapter, LinearAdapter):
            assert isinstance(call, BaseView), "linear adapters come before whole-module ones"
            call = Adapted(adapter, call)
    for adapter in adapters:
        if isinstance(adapter, SublayerAdapter):
            call = functools.partial(_adapted_block, adapter, module, call)
        elif isinstance(adapter, (ModuleCopy, Around)):
            call = functools.partial(adapter, call)
    return call


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
