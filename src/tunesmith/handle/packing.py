"""Whether a model takes packed rows."""

from __future__ import annotations

from typing import Any

from ..runtime import packed_row
from ..runtime.frame import Frame
from .frames import Frames


def packing_fault(model: Any) -> str | None:
    """Why texts of one row cannot be kept apart on a handle, as its adapters act now; None where they can."""
    if isinstance(model, Frames):
        return packed_row.fault(model.base_model, model.frame)
    return packed_row.fault(model, Frame({}))


def can_pack(model: Any) -> bool:
    """Whether a handle, as its adapters act now, takes packed rows (of a bare base: whether its handles will)."""
    return packing_fault(model) is None
