"""A base view with an adapter applied, so that the next adapter acts on both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapter import LinearAdapter
from ..bases.view import BaseView


class Adapted(BaseView):
    """A base view with an adapter applied, itself a base view: what the next adapter sees as its base."""

    def __init__(self, adapter: LinearAdapter, base: BaseView) -> None:
        super().__init__(base.module)
        self.adapter = adapter
        self.base = base
        self.tokens_in = base.tokens_in  # type: ignore[misc]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.adapter(x, self.base, *args, **kwargs)
        return result

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
