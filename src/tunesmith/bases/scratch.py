"""4-bit weights decoded into memory that is used again: a weight lives for one product, and the next one takes its place.

Fresh memory for every weight costs more than decoding into it (pages are zeroed first), and freed blocks of that size leave
gaps in the heap. bitsandbytes' operation has no output argument on a CPU, but the function of its library beneath has.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LARGEST_BLOCK = 1024  # the library's function is inexact beyond, and bitsandbytes decodes otherwise


class _Memory(threading.local):
    bytes: Tensor | None = None


_memory = _Memory()


def decoded(codes: Tensor, state: Any, dtype: torch.dtype) -> Tensor | None:
    """The dense weight `(out, in)`, good until this thread's next call; None where the library's function does not apply.

    Args:
        codes: uint8, two weights in each.
        state: bitsandbytes' `QuantState`.
    """
    decode = _function(state.quant_type, dtype)
    fits = codes.device.type == "cpu" and codes.dtype == torch.uint8 and codes.is_contiguous()
    if decode is None or not fits or state.shape[1] % 2 or state.blocksize > _LARGEST_BLOCK or torch.compiler.is_compiling():
        return None
    scales = _scales(state)  # (blocks,)
    out, inner = state.shape
    weight = _room(out * inner * dtype.itemsize).view(dtype).view(out, inner)
    decode(
        ctypes.c_void_p(codes.data_ptr()), ctypes.c_void_p(scales.data_ptr()), ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_longlong(state.blocksize), ctypes.c_longlong(out), ctypes.c_longlong(inner),
    )  # fmt: skip
    return weight


def give_back() -> None:
    """Free this thread's memory."""
    _memory.bytes = None


def _room(count: int) -> Tensor:
    if _memory.bytes is None or len(_memory.bytes) < count:
        _memory.bytes = None  # before the larger one is taken
        with torch.inference_mode(False):
            _memory.bytes = torch.empty(count, dtype=torch.uint8)
    return _memory.bytes[:count]


def _scales(state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        plain: Tensor = state.absmax
        return plain.float().contiguous()
    nested: Tensor = dequantize_blockwise(state.absmax, state.state2)
    return (nested + state.offset).float()


def _function(quant_type: str, dtype: torch.dtype) -> Any:
    """The library's function; None where this version of it, or this machine's, has none."""
    from bitsandbytes.cextension import lib

    if dtype not in _TYPES:
        return None
    library = getattr(lib, "_lib", None)  # the stand-in for a library that is missing has none
    return getattr(library, f"cdequantize_blockwise_cpu_{quant_type}_{_TYPES[dtype]}", None)
