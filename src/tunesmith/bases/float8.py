"""Views of linear maps whose weight is stored in 8-bit floats with scales beside it.

    W[i, j] = code[i, j] * scale[i // m, j // n]     blocks of m x n; or one scale for each output, or one for all

They compute through their own forward, whose kernel may round the inputs to 8 bits, too. Where such a kernel leaves no
gradient behind, as in transformers 5.9, the view adds `dx = dy W`, without which layers below would train on a part of it.

DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", https://arxiv.org/abs/2412.19437 (section 3.3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.decoded_linear import Decoded, with_gradient
from .quantised import OfInputType
from .stored_tensors import FLOAT8
from .view import class_forward, own_parameter, register_view

_SCALES = ("weight_scale_inv", "weight_scale")  # both are factors, whatever the name


@register_view(
    "transformers.integrations.finegrained_fp8.FP8Linear",
    "transformers.integrations.fbgemm_fp8.FbgemmFp8Linear",
)
class Float8View(OfInputType):
    """A linear map in 8-bit floats."""

    @property
    def decodes(self) -> bool:
        return False

    def storage_fault(self) -> str | None:
        weight, scale = own_parameter(self.module, "weight"), self._scale
        if weight.dtype not in FLOAT8 or scale is None:
            return f"its weight is stored as {weight.dtype}, where 8-bit floats with scales are expected"
        out, inner = self.shape
        m, n = self._block
        if weight.shape != self.shape or scale.numel() != -(-out // m) * -(-inner // n):
            return (
                f"its stored weight has shape {tuple(weight.shape)} and {scale.numel()} scales, but blocks of {m} x {n} of a "
                f"weight {tuple(self.shape)} are expected; load the right files"
            )
        return None

    @property
    def _scale(self) -> nn.Parameter | None:
        return next((self.module._parameters[name] for name in _SCALES if name in self.module._parameters), None)

    @property
    def _block(self) -> tuple[int, int]:
        """Outputs and inputs that share a scale."""
        block, scale = getattr(self.module, "block_size", None), self._scale
        if block is not None:
            return block[0], block[1]
        out, inner = self.shape
        return (1 if scale is not None and scale.numel() == out else out), inner

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = class_forward(self.module)(x, *args, **kwargs)
        if x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
            return with_gradient(y, x, self.operand(y.dtype))
        return y

    def matmul(self, x: Tensor) -> Tensor:
        y, bias = self(x), self.bias
        return y if bias is None else y - bias.to(y.dtype)

    def operand(self, dtype: torch.dtype) -> Decoded:
        return Decoded(self.weight_as, dtype)

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        assert self._scale is not None
        return (own_parameter(self.module, "weight").detach().float() * self._spread(self._scale.detach().float())).to(dtype)

    def _spread(self, scale: Tensor) -> Tensor:
        """One scale for each weight, `(out, in)`."""
        (out, inner), (m, n) = self.shape, self._block
        scale = scale.view(-(-out // m), -(-inner // n))  # one for each block
        return scale.repeat_interleave(m, 0)[:out].repeat_interleave(n, 1)[:, :inner]

    def parameter(self, weight: Tensor) -> nn.Parameter:
        old, scale, (m, n) = own_parameter(self.module, "weight"), self._scale, self._block
        assert scale is not None
        old.scale = scale  # it may be restored later and then needs its own scales
        out, inner = self.shape
        padded = nn.functional.pad(weight.abs(), (0, -inner % n, 0, -out % m))
        largest = padded.unflatten(1, (-1, n)).unflatten(0, (-1, m)).amax((1, 3))  # one for each block
        factors = largest.clamp_min(torch.finfo(torch.float32).tiny) / torch.finfo(old.dtype).max
        if scale.dtype in FLOAT8:
            factors = factors.log2().ceil().exp2()  # stored as powers of two
        factors = factors.clamp_min(2.0**-120).to(scale.dtype)
        new = nn.Parameter((weight / self._spread(factors.float())).to(old.dtype), requires_grad=False)
        new.scale = nn.Parameter(factors.view(scale.shape), requires_grad=False)  # type: ignore[attr-defined]
        return new

    def adopt(self) -> None:
        scale: nn.Parameter | None = getattr(own_parameter(self.module, "weight"), "scale", None)
        if scale is not None:
            name = next(name for name in _SCALES if name in self.module._parameters)
            self.module._parameters[name] = scale


@register_view("transformers.integrations.finegrained_fp8.FP8GroupedLinear")
class Float8GroupedView(Float8View):
    """Several maps side by side, each with a share of the input."""

    def storage_fault(self) -> str | None:
        return "it holds the maps of several groups, each for a share of the input, and no adapter has that form"
