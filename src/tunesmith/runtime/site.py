"""The place in front of a base module's `forward` where adapters act.

A `Site` is stored in the module's `__dict__` under "forward": `nn.Module.__call__` looks `forward` up on the instance before
the class, and deleting the entry restores the class's. The module keeps its class, name, parameters and place. A site holds
no adapter and no strong reference, so handles are freed when dropped, and copies and pickles of a base alone are plain bases.
"""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any

import torch
from torch import nn

from ..bases.view import class_forward, computing_view
from ..errors import TargetError
from . import reads
from .fold import fold
from .frame import Frame, current_frame, set_running
from .mixed_batch import run_by_rows
from .recompute import without_gradients


class Site:
    """Stands before one module's forward: the plain forward, or the fold of the current frame's adapters on it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.__name__ = "forward"
        self.__signature__ = inspect.signature(class_forward(module))
        self.view = computing_view(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module()
        frame = current_frame()
        if frame is None:
            return self._plain(module, args, kwargs)
        outer = set_running(self)
        try:
            if frame.mixture is not None:
                return self._mixed(module, frame, args, kwargs)
            adapters = frame.adapters.get(self)
            if not adapters:
                return self._plain(module, args, kwargs)
            if frame.fired is not None:
                frame.fired.add(self)
            if frame.training and not torch.is_grad_enabled():
                without_gradients(self, lambda: _train(adapters))
            return fold(module, adapters)(*args, **kwargs)
        finally:
            set_running(outer)

    def _mixed(self, module: Any, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mixture: Any = frame.mixture
        adapters = [part.adapters.get(self, ()) for part in mixture.frames]
        if not any(adapters):
            return self._plain(module, args, kwargs)
        if frame.fired is not None:
            frame.fired.add(self)
        if frame.training and not torch.is_grad_enabled():
            without_gradients(self, lambda: any(map(_train, adapters)))
        return run_by_rows(module, mixture, adapters, args, kwargs)

    def _plain(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.view is None:
            return type(module).forward(module, *args, **kwargs)
        return self.view(module)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a base alone hold the class's forward, which is found before their `__dict__` is filled."""
        return getattr, (self.module(), "forward")


def _train(adapters: tuple[Any, ...]) -> bool:
    parameters = (p for adapter in adapters if isinstance(adapter, nn.Module) for p in adapter.parameters())
    return any(p.requires_grad for p in parameters)


def site_of(module: nn.Module) -> Site | None:
    """The site installed on `module`, or None."""
    return next((module.__dict__[slot] for slot in _SLOTS if isinstance(module.__dict__.get(slot), Site)), None)


def fault(module: nn.Module) -> str | None:
    """Why no site can be installed on `module`; None if it can."""
    present = module.__dict__.get(_slot(module))
    if present is None or isinstance(present, Site) or _is_plain(module, present):
        return None
    return f"its forward was replaced by {present!r}, which would hide the adapter; attach before replacing it"


def install(module: nn.Module) -> Site:
    """The module's site, installed if there is none yet.

    A site goes innermost: accelerate's hooks keep the module's own forward in `_old_forward` and call it with the
    weights in place, so the site takes that slot where it exists.

    Raises:
        TargetError: the module's forward is an instance attribute that is not ours.
    """
    found = site_of(module)
    if found is None:
        reason = fault(module)
        if reason is not None:
            raise TargetError(f"{type(module).__name__}: {reason}")
        found = Site(module)
        module.__dict__[_slot(module)] = found
        reads.intercept(module, found)
    return found


def move(module: nn.Module) -> None:
    """Give a shallow copy of a module, which holds the original's site, a site of its own."""
    for slot in _SLOTS:
        found = module.__dict__.get(slot)
        if isinstance(found, Site) and found.module() is not module:
            moved = object.__new__(Site)
            moved.__dict__.update(found.__dict__, module=weakref.ref(module))
            module.__dict__[slot] = moved


def remove(module: nn.Module) -> None:
    """Remove our site and nothing else; a hook that wraps it then wraps the plain forward."""
    if isinstance(module.__dict__.get("_old_forward"), Site):
        module.__dict__["_old_forward"] = class_forward(module)
    if isinstance(module.__dict__.get("forward"), Site):
        del module.__dict__["forward"]
    reads.release(module)


_SLOTS = ("_old_forward", "forward")


def _slot(module: nn.Module) -> str:
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def _is_plain(module: nn.Module, forward: Any) -> bool:
    """Whether `forward` is the class's own, bound to this module (accelerate leaves such attributes behind)."""
    return isinstance(forward, types.MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward
