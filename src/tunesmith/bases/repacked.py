"""4-bit weights, repacked for bitsandbytes' CPU kernel for products of few rows and kept beside the stored ones.

Decoding a weight to multiply one row by it costs ten times the product. For CPUs with AVX-512 bf16 bitsandbytes has a kernel
that decodes within the product; it needs the codes in blocks of 32 outputs and the scales in bf16. The package rewrites the
module for that; here the repacked form is kept beside the stored one (half a byte per weight), from the first such product
until the next training step.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

FEW_ROWS = 64  # beyond this, decoding once and multiplying is as fast
OUTPUTS = 32  # per block

_repacked: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Tensor, Any]] = weakref.WeakKeyDictionary()


def product_of_few_rows(module: nn.Module, x: Tensor, state: Any) -> Tensor | None:
    """`x W^T` of a 4-bit module for a few rows of bf16, `(..., out)`; None if the kernel does not apply.

    Equal to the product with the decoded weight up to bf16 rounding: of the scales here, of the decoded weights there.
    """
    weight: Any = module.weight
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    fits = state.shape[0] % OUTPUTS == 0 and state.shape[1] % state.blocksize == 0
    if not (0 < rows <= FEW_ROWS and fits and x.dtype == torch.bfloat16 and _has_kernel()) or torch.compiler.is_compiling():
        return None
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, gemv_4bit

    found = _repacked.get(module)
    if found is None or found[0] is not weight:
        found = (weight, *_convert_weight_packed_for_cpu(weight.data, copy.copy(state)))
        _repacked[module] = found
    product: Tensor = gemv_4bit(x.contiguous(), found[1], state=found[2])
    return product


def drop(module: nn.Module) -> None:
    """Discard the repacked form of a module, if there is one."""
    _repacked.pop(module, None)


def _has_kernel() -> bool:
    from bitsandbytes import functional

    return hasattr(functional, "_convert_weight_packed_for_cpu") and bool(functional.has_avx512bf16())
