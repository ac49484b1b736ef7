"""Views of modules that store their weight as one dense tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .view import BaseView, register_view


@register_view(nn.Linear)
class LinearView(BaseView):
    """`nn.Linear`: weight `(out, in)`, A `(r, in)`, B `(out, r)`."""

    plain_types = (nn.Linear, Conv1D)
    plain_forwards = (nn.Linear.forward, Conv1D.forward)

    def sample(self) -> Tensor:
        return torch.randn(2, self.shape[1], dtype=self.dtype)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def low_rank_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out, inner = self.shape
        return (r, inner), (out, r)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return F.linear(h, b)


@register_view(Conv1D)
class Conv1DView(LinearView):
    """GPT-2's `Conv1D`: a linear map whose weight is stored `(in, out)`."""

    def weight(self) -> Tensor:
        return super().weight().T

    @property
    def shape(self) -> torch.Size:
        inner, out = super().shape
        return torch.Size((out, inner))

    def stored(self, weight: Tensor) -> Tensor:
        return weight.T.contiguous()


@register_view(nn.Embedding)
class EmbeddingView(BaseView):
    """`nn.Embedding`: a lookup in `(tokens, dim)`; A `(r, tokens)`, B `(dim, r)`, the change is `(B A)^T`."""

    tokens_in = True
    plain_forwards = (nn.Embedding.forward,)

    def sample(self) -> Tensor:
        return torch.arange(min(self.shape[0], 4))

    @property
    def output_scale(self) -> Any:
        scale = getattr(self.module, "embed_scale", 1)
        return scale.to(self.module.weight.dtype) if isinstance(scale, Tensor) else scale

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._look_up(x, weight)

    def low_rank_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        tokens, dim = self.shape
        return (r, tokens), (dim, r)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self._look_up(x, a.T)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return F.linear(h, b)

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T

    def _look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        module = self.module
        rows = F.embedding(ids, table, module.padding_idx, None, module.norm_type, module.scale_grad_by_freq)
        return rows * self.output_scale if hasattr(module, "embed_scale") else rows


@register_view(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvView(BaseView):
    """Convolutions: weight `(out, in / groups, *kernel)`; A is a convolution of the same kernel to r channels, B one of size 1.

    With groups, A mixes all input channels and B keeps the groups, as in the ecosystem's files; such a change is not a
    change of the grouped weight, so it cannot be merged.
    """

    plain_forwards = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.kernel: tuple[int, ...] = self.module.kernel_size
        self.ones = (1,) * len(self.kernel)

    def sample(self) -> Tensor:
        reach = [step * (size - 1) + 3 for step, size in zip(self.module.dilation, self.kernel)]
        return torch.randn(1, self.module.in_channels, *reach, dtype=self.dtype)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.module._conv_forward(x, weight, None)

    def low_rank_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        module = self.module
        return (r, module.in_channels, *self.kernel), (module.out_channels, r // module.groups, *self.ones)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        module, padding = self.module, self.module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        return self._convolve(x, a, stride=module.stride, padding=padding, dilation=module.dilation)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return self._convolve(h, b, groups=self.module.groups)

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        assert self.compose_fault() is None
        return (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])

    def per_output(self, values: Tensor) -> Tensor:
        return values.view(-1, *self.ones)

    def compose_fault(self) -> str | None:
        grouped = self.module.groups > 1
        return "a low-rank change of a grouped convolution has no grouped weight to merge into" if grouped else None

    def _convolve(self, x: Tensor, weight: Tensor, **how: Any) -> Tensor:
        return (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1](x, weight, None, **how)


def product_fault(view: BaseView) -> str | None:
    """Why a change beside the module is no change of its weight, found by trying a small input; None where it is one."""
    sample = getattr(view, "sample", None)
    if view.computes or type(view.module).forward in view.plain_forwards or sample is None:
        return None
    with torch.no_grad():
        x = sample().to(view.weight().device)
        y = view.matmul(x) if view.bias is None else view.matmul(x) + view.per_output(view.bias)
        same = torch.allclose(view(x), y, rtol=1e-2, atol=1e-2 * y.abs().max().item())
    return None if same else "its forward computes something else than the product of its weight and the input"
