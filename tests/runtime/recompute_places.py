"""Ways in which a model can compute some of its layers again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed._composable import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(torch.tanh(self.up(x))))


class Net(nn.Module):
    """Three blocks; `through[i]` calls the i-th, and `around` all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 3)
        self.through: list[Callable[..., Tensor]] = [_call] * 3
        self.around: Callable[..., Tensor] = _call

    def stack(self, x: Tensor) -> Tensor:
        for block, through in zip(self.blocks, self.through):
            x = through(block, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.around(self.stack, x))


def _call(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    return function(x)


# --- mechanisms -------------------------------------------------------------------------------------------------------


class _Recomputed(torch.autograd.Function):
    """What libraries of their own do: keep the input, run the function again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            result = ctx.function(x)
        torch.autograd.backward(result, gradient)
        return None, x.grad


def _by_hooks(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Saved tensors are forgotten, and found again by running the function once more."""
    saved: list[Tensor] = []
    count = iter(range(10**6))

    def unpack(index: int) -> Tensor:
        if not saved:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_keep_in(saved), lambda tensor: tensor):
                function(x)
        return saved[index]

    with torch.autograd.graph.saved_tensors_hooks(lambda _: next(count), unpack):
        return function(x)


def _keep_in(saved: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    return pack


REENTRANT = functools.partial(checkpoint, use_reentrant=True)
NON_REENTRANT = functools.partial(checkpoint, use_reentrant=False)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "reentrant": REENTRANT,
    "non-reentrant": NON_REENTRANT,
    "a function": _Recomputed.apply,
    "hooks": _by_hooks,
}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "reentrant wrapper": functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
    "non-reentrant wrapper": functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
    "composable": composable,
}


def _sequential(reentrant: bool) -> Callable[[Net], None]:
    def change(net: Net) -> None:
        net.around = lambda _, x: checkpoint_sequential(list(net.blocks), 2, x, use_reentrant=reentrant)

    return change


def _through(mechanism: str, *indices: int, nested: bool = False) -> Callable[[Net], None]:
    def change(net: Net) -> None:
        for index in indices:
            net.through[index] = FUNCTIONS[mechanism]
        if nested:
            net.around = FUNCTIONS[mechanism]

    return change


def _wrapped(mechanism: str, *indices: int) -> Callable[[Net], None]:
    def change(net: Net) -> None:
        for index in indices:
            net.blocks[index] = WRAPPERS[mechanism](net.blocks[index])

    return change


PLACES: dict[str, Callable[[Net], None]] = {
    **{f"{name}, first": _through(name, 0) for name in FUNCTIONS},
    **{f"{name}, last": _through(name, 2) for name in FUNCTIONS},
    **{f"{name}, all": _through(name, 0, 1, 2) for name in FUNCTIONS},
    **{f"{name}, nested": _through(name, 0, 1, 2, nested=True) for name in ("reentrant", "non-reentrant", "a function")},
    **{f"{name}, first": _wrapped(name, 0) for name in WRAPPERS},
    **{f"{name}, all": _wrapped(name, 0, 1, 2) for name in WRAPPERS},
    "reentrant, sequential": _sequential(reentrant=True),
    "non-reentrant, sequential": _sequential(reentrant=False),
}


def net_with(change: Callable[[Net], None]) -> Net:
    torch.manual_seed(0)
    net = Net().double()
    change(net)
    return net
