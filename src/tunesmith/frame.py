"""Which adapters act during the current call, per thread.

A `Frame` maps each site to the adapters that act there. It is immutable once made, so one frame serves any number of
threads and calls. Outside any frame every site computes exactly what its module did before.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .contracts import Adapter, PromptAdapter
    from .site import Site


class Frame:
    """`{site: adapters}` for one call.

    Args:
        adapters: what acts at each site, the first one nearest to the base module.
        prompts: what acts at the model's entrance, each with the number of its virtual tokens.
        fired: where given, collects the sites that were reached (the check of the first training step).
        penalties: what is added to the loss in training.
    """

    def __init__(
        self,
        adapters: dict[Site, tuple[Adapter, ...]],
        prompts: tuple[tuple[PromptAdapter, int], ...] = (),
        fired: set[Site] | None = None,
        penalties: tuple[Callable[[], Tensor], ...] = (),
    ) -> None:
        self.adapters = adapters
        self.prompts = prompts
        self.fired = fired
        self.penalties = penalties


class _Local(threading.local):
    frame: Frame | None = None


_local = _Local()


def current_frame() -> Frame | None:
    """The frame of this thread's innermost handle call, or None."""
    return _local.frame


class entered:
    """Context manager: `frame` is this thread's current frame inside, the previous one again after.

    Never hold one across a `yield`: the caller of a suspended generator would run under it.
    """

    def __init__(self, frame: Frame | None) -> None:
        self.frame = frame
        self.previous: Frame | None = None

    def __enter__(self) -> Frame | None:
        self.previous = _local.frame
        _local.frame = self.frame
        return self.frame

    def __exit__(self, *_: object) -> None:
        _local.frame = self.previous


class CarriesFrame:
    """A checkpointing function whose recomputation sees the frame of its forward pass.

    Backward passes run after the handle's call has ended (and, on CUDA, on another thread), so a recomputed layer would
    run without adapters: reentrant checkpointing then returns `None` gradients and training goes on silently.
    Reentrant checkpointing also needs one input that requires a gradient; a frozen embedding gives none, so an alias
    of the first floating-point input asks for one.
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
        """A copy or pickle of the base alone holds the function as it was."""
        return copy.copy, (self.checkpoint,)

    def _is_reentrant(self) -> bool:
        return bool(getattr(self.checkpoint, "keywords", {}).get("use_reentrant", False))


def _with_one_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args`, where none asks for a gradient with the first floating-point one replaced by an alias that does."""
    floating = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()]
    if not floating or any(args[i].requires_grad for i in floating):
        return args
    first = floating[0]
    return (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
