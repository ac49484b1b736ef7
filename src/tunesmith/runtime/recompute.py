"""Backward passes see the frame of their forward pass.

A backward pass runs after the handle's call has ended (and, on CUDA, on another thread). Whatever computes a part of the
model again there, or calls it for the first time, would run without adapters: reentrant checkpointing then returns no
gradients, and training continues silently. So what is recorded inside a frame remembers it, in the three places where Python
code runs in a backward pass:

- nodes of `torch.autograd.Function` (reentrant checkpointing, and checkpointing functions of other packages),
- torch's non-reentrant checkpointing,
- hooks on saved tensors.

They hold for every model, since no code has to call us: `install` changes torch's own classes, once per process. Outside any
handle they do nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint

from ..errors import UsageError
from .frame import FRAME, Frame, Place, began_with_gradients, current_frame, entered, remember_frame

AGAIN = "_tunesmith_again"  # attribute of a node: the sites that must run in its backward pass


@functools.cache
def install() -> None:
    """Let nodes, checkpoints and hooks remember the frame in which they are made."""
    setattr(BackwardCFunction, FRAME, None)
    BackwardCFunction.__init__ = remember_frame  # type: ignore[assignment, method-assign]
    _wrap(BackwardCFunction, "_get_user_fn", _backward_of)
    _wrap(checkpoint._CheckpointFrame, "__init__", _checkpoint_made)
    _wrap(saved_tensors_hooks, "__init__", _hooks_made)
    checkpoint.CheckpointFunction.apply = classmethod(_reentrant_checkpoint)  # type: ignore[assignment]


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    inner = getattr(owner, name)
    setattr(owner, name, functools.wraps(inner)(lambda self, *args, **kwargs: wrapper(inner, self, *args, **kwargs)))


# --- nodes ----------------------------------------------------------------------------------------------------------


def _backward_of(inner: Callable[..., Any], node: Any) -> Any:
    backward, frame = inner(node), getattr(node, FRAME)
    if frame is current_frame() and not hasattr(node, AGAIN):
        return backward
    return functools.partial(_run_backward, frame, backward)


def _run_backward(frame: Frame | None, backward: Callable[..., Any], node: Any, *gradients: Any) -> Any:
    expected: set[Place] = getattr(node, AGAIN, set())
    fired: set[Place] = set()
    if frame is not None and expected:
        frame = frame.recording(fired)
    # Most nodes compute with tensors alone; what calls a module keeps it, or a function around it.
    calls = any(callable(value) for value in vars(node).values())
    with entered(frame, state=calls, gradients=True):
        result = backward(node, *gradients)
    if expected - fired:
        raise UsageError(
            f"{len(expected - fired)} adapted modules ran inside {node.name()} without recording gradients, and were not "
            "computed again in the backward pass, so their adapters would silently get no gradient; leave these modules out of "
            "target_modules, or call them outside of that function"
        )
    return result


def without_gradients(at: Place, trains: Callable[[], bool]) -> None:
    """Note that adapters ran without recording gradients in a call that records them: they must run again later.

    Raises:
        UsageError: they cannot, because nothing that enters the function that runs them requires a gradient.
    """
    if not began_with_gradients() or not trains():
        return
    node = _enclosing_function()
    if node is None:  # under torch.no_grad() by the model's own wish
        return
    if not any(node.needs_input_grad):
        raise UsageError(
            "gradient checkpointing runs adapted modules on inputs none of which requires a gradient, so their adapters would "
            "silently get none; call enable_input_require_grads() on the handle, or use use_reentrant=False"
        )
    if not hasattr(node, AGAIN):
        setattr(node, AGAIN, set())
    getattr(node, AGAIN).add(at)


def _enclosing_function() -> Any:
    """The node of the outermost `torch.autograd.Function` whose forward is running; None if there is none."""
    found, frame = None, sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_name == "forward":
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, BackwardCFunction):
                found = first
        frame = frame.f_back  # type: ignore[assignment]
    return found


# --- checkpoints and hooks of torch ------------------------------------------------------------------------------------


def _bound(frame: Frame | None, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with entered(frame):
            return function(*args, **kwargs)

    return run


def _checkpoint_made(inner: Callable[..., Any], self: Any, recompute: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    inner(self, _bound(current_frame(), recompute), *args, **kwargs)


def _hooks_made(inner: Callable[..., Any], self: Any, pack_hook: Any, unpack_hook: Any) -> None:
    """Hooks of the user; torch's own (checkpoints, offloading) call no modules by themselves."""
    of_python = not any(isinstance(hook, torch.fx.GraphModule) for hook in (pack_hook, unpack_hook))
    if type(self) is saved_tensors_hooks and of_python and not torch.compiler.is_compiling():
        pack_hook, unpack_hook = functools.partial(_pack, pack_hook), functools.partial(_unpack, unpack_hook)
    inner(self, pack_hook, unpack_hook)


def _pack(hook: Callable[[Tensor], Any], tensor: Tensor) -> tuple[Frame | None, Any]:
    return current_frame(), hook(tensor)


def _unpack(hook: Callable[[Any], Tensor], packed: tuple[Frame | None, Any]) -> Tensor:
    with entered(packed[0]):
        return hook(packed[1])


def _reentrant_checkpoint(function_class: Any, function: Any, preserve: bool, *args: Any) -> Any:
    """Reentrant checkpointing needs one input that requires a gradient; a frozen embedding gives none, so an alias does."""
    if current_frame() is not None and torch.is_grad_enabled():
        args = _with_one_gradient(args)
    return super(checkpoint.CheckpointFunction, function_class).apply(function, preserve, *args)


def _with_one_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args`; if none requires a gradient, with the first floating-point one replaced by an alias that does."""
    floating = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()]
    if not floating or any(args[i].requires_grad for i in floating):
        return args
    first = floating[0]
    return (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
