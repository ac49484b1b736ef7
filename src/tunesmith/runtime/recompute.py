"""Recomputed layers see the frame of their forward pass."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from .frame import current_frame, entered


class CarriesFrame:
    """A checkpointing function whose recomputation sees the frame of its forward pass.

    Backward passes run after the handle's call has ended (and, on CUDA, on another thread), so a recomputed layer would
    run without adapters: reentrant checkpointing then returns `None` gradients, and training continues silently.
    Reentrant checkpointing also needs one input that requires a gradient; a frozen embedding gives none, so an alias
    of the first floating-point input does.
    """

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame()
        if frame is None:
            return self.checkpoint(function, *args, **kwargs)
        if self._is_reentrant():
            args = _with_one_gradient(args)

        def run(*inner: Any, **named: Any) -> Any:
            with entered(frame):
                return function(*inner, **named)

        return self.checkpoint(run, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or pickle of the base alone holds the original function."""
        return copy.copy, (self.checkpoint,)

    def _is_reentrant(self) -> bool:
        return bool(getattr(self.checkpoint, "keywords", {}).get("use_reentrant", False))


def _with_one_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args`; if none requires a gradient, with the first floating-point one replaced by an alias that does."""
    floating = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()]
    if not floating or any(args[i].requires_grad for i in floating):
        return args
    first = floating[0]
    return (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
