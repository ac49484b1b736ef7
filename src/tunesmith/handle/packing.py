"""Whether a model supports packed rows."""

from __future__ import annotations

from typing import Any

from ..runtime import packed_row
from ..runtime.frame import Frame


def packing_fault(model: Any) -> str | None:
    """Why texts of one row cannot be kept apart with a handle's effective adapters; None if they can."""
    if hasattr(model, "peft_config"):  # also a handle inside the wrapper of torch.compile, which passes attributes on
        return packed_row.fault(model.bare_base, model.effective_frame)
    return packed_row.fault(model, Frame({}))


def can_pack(model: Any) -> bool:
    """Whether a handle with its effective adapters supports packed rows (for a base: whether its handles will)."""
    return packing_fault(model) is None
