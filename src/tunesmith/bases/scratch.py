"""4-bit weights decoded into reused scratch memory: a weight lives for one product, and the next one takes its place.

Fresh memory for every weight costs more than decoding into it (pages are zeroed first), and freed blocks of that size
fragment the heap. On a CPU bitsandbytes' operator has no output argument, but the library function under it does.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LARGEST_BLOCK = 1024  # beyond it the library function is inexact, and bitsandbytes decodes in another way


class _Memory(threading.local):
    bytes: Tensor | None = None


_memory = _Memory()


def decoded(codes: Tensor, state: Any, dtype: torch.dtype) -> Tensor | None:
    """The dense weight `(out, in)`, valid until this thread's next call; None if the library function does not apply.

    Args:
        codes: uint8, two weights per byte.
        state: bitsandbytes' `QuantState`.
    """
    decode = _function(state.quant_type, dtype)
    fits = codes.device.type == "cpu" and codes.dtype == torch.uint8 and codes.is_contiguous()
    if decode is None or not fits or state.shape[1] % 2 or state.blocksize > _LARGEST_BLOCK or torch.compiler.is_compiling():
        return None
    scales = _scales(state)  # (blocks,)
    out, inner = state.shape
    weight = _buffer(out * inner * dtype.itemsize).view(dtype).view(out, inner)
    decode(
        ctypes.c_void_p(codes.data_ptr()), ctypes.c_void_p(scales.data_ptr()), ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_longlong(state.blocksize), ctypes.c_longlong(out), ctypes.c_longlong(inner),
    )  # fmt: skip
    return weight


def free() -> None:
    """Free this thread's memory."""
    _memory.bytes = None


def _buffer(count: int) -> Tensor:
    if _memory.bytes is None or len(_memory.bytes) < count:
        _memory.bytes = None  # before the larger one is allocated
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
    """The library function; None if this version or this machine's build does not have it."""
    from bitsandbytes.cextension import lib

    if dtype not in _TYPES:
        return None
    library = getattr(lib, "_lib", None)  # the placeholder for a missing library has none
    return getattr(library, f"cdequantize_blockwise_cpu_{quant_type}_{_TYPES[dtype]}", None)
