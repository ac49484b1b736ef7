"""Arguments that make `from_pretrained` quantise a base to 4 or 8 bits while it loads."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..errors import UsageError
from .precision import fast_dtype

QUANT_TYPES = ("nf4", "fp4")


def stored_in(
    bits: int, compute_dtype: torch.dtype | None = None, quant_type: str = "nf4", double_quant: bool = True
) -> dict[str, Any]:
    """Arguments for `from_pretrained`; empty if the base is not quantised.

    Args:
        bits: 4 or 8; 16 keeps the weights as stored.
        compute_dtype: the dtype in which 4-bit modules compute; None means bfloat16 where that is fast, else float32.
        quant_type, double_quant: for 4 bits: one of `QUANT_TYPES`, and whether the scales are stored in 8 bits.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    if bits == 16:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f'a {bits}-bit base needs bitsandbytes, which is not installed; pip install "tunesmith[quant]"')
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype or fast_dtype() or torch.float32,
    )
    return {"quantization_config": four}
