"""What all handles of one base share."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from .state import HandleState


class SharedBase:
    """What all handles of one base share: its parameters' original `requires_grad`, and weak references to the handles."""

    def __init__(self, requires_grad: dict[str, bool]) -> None:
        self.requires_grad = requires_grad
        self.handles: weakref.WeakSet[HandleState] = weakref.WeakSet()

    def thaw(self, base: nn.Module) -> None:
        """Restore the `requires_grad` of the parameters of `base`, or of a copy of it."""
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, False))

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedBase, (self.requires_grad,)


_by_base: weakref.WeakKeyDictionary[nn.Module, SharedBase] = weakref.WeakKeyDictionary()


def handles_of(base: nn.Module) -> list[HandleState]:
    """The handles that use `base` now."""
    return list(_by_base[base].handles) if base in _by_base else []


def join(handle: HandleState) -> SharedBase:
    """Register `handle` with its base; the first one records which parameters were trainable."""
    base = handle.bare_base
    if base not in _by_base:
        _by_base[base] = SharedBase({name: p.requires_grad for name, p in base.named_parameters()})
    _by_base[base].handles.add(handle)
    return _by_base[base]


def adopt(handle: HandleState, shared: SharedBase) -> None:
    """Register a copied or unpickled handle with its own base; `shared` was copied with them."""
    _by_base[handle.bare_base] = shared
    shared.handles.add(handle)


def leave(handle: HandleState, shared: SharedBase) -> bool:
    """Unregister `handle`; returns whether it was the last one of its base."""
    shared.handles.discard(handle)
    if shared.handles:
        return False
    _by_base.pop(handle.bare_base, None)
    return True
