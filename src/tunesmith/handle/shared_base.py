"""What all handles of one base share."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ..model import PeftModel


class BaseRecord:
    """What all handles of one base share: its parameters' original `requires_grad`, and weak references to them."""

    def __init__(self, requires_grad: dict[str, bool]) -> None:
        self.requires_grad = requires_grad
        self.handles: weakref.WeakSet[PeftModel] = weakref.WeakSet()

    def thaw(self, base: nn.Module) -> None:
        """Give the parameters of `base`, or of a copy of it, their `requires_grad` back."""
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, False))

    def __reduce__(self) -> tuple[Any, ...]:
        return BaseRecord, (self.requires_grad,)


records: weakref.WeakKeyDictionary[nn.Module, BaseRecord] = weakref.WeakKeyDictionary()
