"""Views of modules that bitsandbytes stores in 4 or 8 bits: the stored form is read and never rewritten.

    4 bits   W = level[code] * scale of its block, level one of 16 (NF4, FP4); a nested scale is itself 8 bits and an offset
    8 bits   W = code * scale of its output / 127

bitsandbytes supplies the form and decodes it. Everything else here keeps it intact: on a CPU the package's evaluation path
repacks the codes and rounds the scales to bf16 in the module itself, and its forward passes rewrite the bias in the input's
dtype. So under a handle these modules compute through their views, whether an adapter acts on them or not.

Dettmers et al. 2023, "QLoRA", https://arxiv.org/abs/2305.14314 (section 3); Dettmers et al. 2022, "LLM.int8()",
https://arxiv.org/abs/2208.07339 (section 2.1).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.decoded_linear import Decoded, decoded_linear
from . import repacked, scratch
from .dense import LinearView
from .stored_tensors import copied, shape_of
from .view import class_forward, register_view, view_type

logger = logging.getLogger(__name__)

_REPACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' own switch for repacking in evaluation


class QuantisedView(LinearView):
    """A linear map whose weight is decoded for each use."""

    computes = True

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.module.out_features, self.module.in_features))

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def stored_dtype(self) -> torch.dtype | None:
        """The dtype of the weight before it was quantised, if the stored form says so."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        return self.weight_as(self.dtype)

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which an input of type `dtype` is multiplied."""
        return self.dtype

    def operand(self, dtype: torch.dtype) -> Decoded:
        return Decoded(self.weight_as, self.computes_in(dtype))

    @property
    def decodes(self) -> bool:
        """Whether to decode and multiply: on other devices the package's own kernels are faster."""
        return self.module.weight.device.type == "cpu"

    @property
    def is_plain(self) -> bool:
        return self.decodes and torch.is_grad_enabled()  # otherwise a product of few rows takes its own path

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.decodes:
            return class_forward(self.module)(x, *args, **kwargs)
        return self._linear(x, self.bias)

    def matmul(self, x: Tensor) -> Tensor:
        return self._linear(x, None)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.operand(x.dtype)
        bias = None if bias is None else bias.to(weight.dtype)
        with torch.autocast(x.device.type, enabled=False):  # the module's own dtype decides
            return decoded_linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    def hold(self) -> bool:
        """Keep the package from rewriting the stored form until `release`; returns whether it already had."""
        return False

    def release(self) -> None:
        """Hand the module back to the package."""

    def adopt(self) -> None:
        """Update the state that the module keeps beside its weight after the weight was replaced."""


@register_view("bitsandbytes.nn.modules.Linear4bit")
class Linear4bitView(QuantisedView):
    @property
    def dtype(self) -> torch.dtype:
        return self.module.compute_dtype or self._state.dtype

    def stored_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._state.dtype
        return dtype

    @property
    def _state(self) -> Any:
        return getattr(self.module.weight, "quant_state", None) or self.module.quant_state

    def storage_fault(self) -> str | None:
        if self._state is None:
            return "its weight is not quantised until it is moved to its device; load the base with transformers"
        if self._state.shape != self.shape:
            return f"its stored weight has shape {tuple(self._state.shape)}, {tuple(self.shape)} expected; load the right files"
        return None

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        state = self._state
        if state.dtype != dtype:
            state = copy.copy(state)
            state.dtype = dtype
        codes: Tensor = self.module.weight.data.view(-1, 1)
        weight: Tensor = dequantize_4bit(codes, state)
        return weight

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() or self.module.training:
            return super()._linear(x, bias)
        y = repacked.product_of_few_rows(self.module, x.to(self.dtype), self._state)
        if y is None:
            return super()._linear(x, bias)
        return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)

    def operand(self, dtype: torch.dtype) -> Decoded:
        if torch.is_grad_enabled():
            repacked.drop(self.module)
        return Decoded(self.weight_as, self.computes_in(dtype), self._decode_to_scratch)

    def _decode_to_scratch(self, dtype: torch.dtype) -> Tensor:
        weight = scratch.decoded(self.module.weight.data, self._state, dtype)
        return self.weight_as(dtype) if weight is None else weight

    def parameter(self, weight: Tensor) -> nn.Parameter:
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn import Params4bit

        old, state = self.module.weight, self._state
        data, new_state = quantize_4bit(
            weight.contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.dtype,
        )
        new_state.dtype = state.dtype
        return Params4bit(
            data,
            requires_grad=False,
            quant_state=new_state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.dtype,
            module=self.module,
            bnb_quantized=True,
        )

    def adopt(self) -> None:
        self.module.quant_state = self.module.weight.quant_state

    def hold(self) -> bool:
        module = self.module
        module.__dict__.setdefault("_repacks_when_released", getattr(module, _REPACKS, False))
        setattr(module, _REPACKS, False)
        was_repacked: bool = getattr(self._state, "packing_format_for_cpu", False)
        if was_repacked:
            self._unpack()
        return was_repacked

    def release(self) -> None:
        repacked.drop(self.module)
        if "_repacks_when_released" in self.module.__dict__:
            setattr(self.module, _REPACKS, self.module.__dict__.pop("_repacks_when_released"))

    def _unpack(self) -> None:
        """Undo an earlier repacking: the codes are restored exactly, the scales as they were rounded."""
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight, state = self.module.weight, copy.copy(self._state)
        scales = state.absmax  # (in / blocksize, out), bf16
        state.original_nested = False  # otherwise it would quantise the rounded scales again
        weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        state.absmax = scales.T.contiguous().flatten().float()
        state.state2 = state.offset = None
        weight.quant_state = self.module.quant_state = state


class OfInputType(QuantisedView):
    """Computes in its input's dtype, and does not say which one its weight had."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def stored_dtype(self) -> None:
        return None


@register_view("bitsandbytes.nn.modules.Linear8bitLt")
class Linear8bitView(OfInputType):
    """On a CPU the input is not rounded to 8 bits, so evaluation matches training."""

    @property
    def decodes(self) -> bool:
        return super().decodes and self._is_stored

    @property
    def _is_stored(self) -> bool:
        found: bool = self.module.weight.dtype == torch.int8
        return found

    @property
    def _scales(self) -> Tensor:
        """`(out,)`; a forward pass of the package moves them from the weight to the module's state."""
        weight, state = self.module.weight, self.module.state
        scales: Tensor = state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
        return scales

    def storage_fault(self) -> str | None:
        if self.module.state.has_fp16_weights:
            return "it keeps 16-bit weights and quantises them at each step; load the base without llm_int8_has_fp16_weight"
        if not self._is_stored:
            return "its weight is not quantised until it is moved to its device; load the base with transformers"
        if self.module.weight.shape != self.shape:
            return f"its stored weight has shape {tuple(self.module.weight.shape)}, {tuple(self.shape)} expected"
        return None

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        weight: Tensor = int8_vectorwise_dequant(self.module.weight.data, self._scales)
        return weight.to(dtype)

    def parameter(self, weight: Tensor) -> nn.Parameter:
        from bitsandbytes.nn import Int8Params

        old, scales = self.module.weight, weight.abs().amax(1).float()  # (out,)
        old.CB, old.SCB = old.data, self._scales  # it may be restored later and then needs its own scales
        codes = (weight * (127 / scales.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).round().to(torch.int8)
        return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)

    def adopt(self) -> None:
        self.module.state.CB = self.module.state.SCB = None  # taken from the weight again


def view_if_quantised(module: nn.Module) -> QuantisedView | None:
    """The view of a module that is quantised; None for any other."""
    kind = view_type(module)
    if kind is None or not issubclass(kind, QuantisedView):
        return None
    view = kind(module)
    return view if view.storage_fault() is None else None


def quantised_views(model: nn.Module) -> Iterator[tuple[str, QuantisedView]]:
    """`(path, view)` of every quantised module of `model`, itself included."""
    for path, module in model.named_modules():
        view = view_if_quantised(module)
        if view is not None:
            yield path, view


def stored_faults(model: nn.Module) -> Iterator[tuple[str, str]]:
    """`(path, fault)` of every module whose stored form is not a usable weight."""
    for path, module in model.named_modules():
        kind = view_type(module)
        fault = kind(module).storage_fault() if kind is not None and issubclass(kind, QuantisedView) else None
        if fault:
            yield path, fault


def hold(model: nn.Module) -> None:
    """Keep bitsandbytes from rewriting what `model` stores, until `release`."""
    count = sum(view.hold() for _, view in quantised_views(model))
    if count:
        logger.warning(
            "bitsandbytes repacked %d modules for evaluation and rounded their scales to bf16; the codes are restored, but to "
            "get the stored scales, reload the base and attach adapters before its first call",
            count,
        )


def release(model: nn.Module) -> None:
    """Hand the modules back to bitsandbytes."""
    scratch.free()
    for _, view in quantised_views(model):
        view.release()


def logical_size(parameter: Tensor) -> int:
    """Number of model parameters that a tensor stands for: two 4-bit ones share a byte, partitioned ones are elsewhere."""
    state = getattr(parameter, "quant_state", None)
    return shape_of(parameter if state is None else state).numel()


def dense_module(view: QuantisedView, dtype: torch.dtype) -> nn.Module:
    """A module of the original type, with the decoded weight."""
    quantised = view.module
    inner, out = quantised.in_features, quantised.out_features
    transposed = issubclass(getattr(quantised, "source_cls", nn.Linear), Conv1D)
    with torch.device("meta"):
        module: Any = Conv1D(out, inner) if transposed else nn.Linear(inner, out, bias=quantised.bias is not None)
    weight = view.weight_as(dtype)
    module.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
    if quantised.bias is not None:
        module.bias = nn.Parameter(quantised.bias.detach().to(dtype), requires_grad=False)
    module.train(quantised.training)
    hook = getattr(quantised, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, copy.copy(hook))
    return module


def dense_copy(module: nn.Module) -> nn.Module:
    """A deep copy in which quantised modules are dense, in the dtype they compute in."""
    found = copied(module)
    for path, view in list(quantised_views(found)):
        dense = dense_module(view, view.dtype)
        if not path:
            return dense
        found.set_submodule(path, dense)
    return found
