"""Ways to reach a module of a handle's base, and to call what was reached."""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from tunesmith import PeftModel

# --- routes: from a handle to the module of that path, which is not empty ------------------------------------------


def _walk(start: Any, path: str, step: Callable[[Any, str], Any]) -> Any:
    return functools.reduce(step, path.split("."), start)


def _last_step(step: Callable[[Any, str], Any]) -> Callable[[PeftModel, str], Any]:
    """To the module around it by attributes, then this step."""

    def route(handle: PeftModel, path: str) -> Any:
        parent, _, name = path.rpartition(".")
        return step(_walk(handle, parent, getattr) if parent else handle.get_base_model(), name)

    return route


def _position(parent: Any, name: str) -> int:
    return [child for child, _ in parent.named_children()].index(name)


def _item(parent: Any, name: str) -> Any:
    if isinstance(parent, (nn.ModuleList, nn.Sequential)):
        return parent[int(name)]
    return parent[name] if isinstance(parent, nn.ModuleDict) else getattr(parent, name)


def _item_from_the_end(parent: Any, name: str) -> Any:
    is_list = isinstance(parent, (nn.ModuleList, nn.Sequential))
    return parent[int(name) - len(parent)] if is_list else _item(parent, name)


def _slice(parent: Any, name: str) -> Any:
    is_list = isinstance(parent, (nn.ModuleList, nn.Sequential))
    return parent[int(name) : int(name) + 1][0] if is_list else _item(parent, name)


def _iterated(parent: Any, name: str) -> Any:
    if isinstance(parent, (nn.ModuleList, nn.Sequential)):
        return next(itertools.islice(iter(parent), int(name), None))
    return dict(parent.items())[name] if isinstance(parent, nn.ModuleDict) else getattr(parent, name)


def _applied(handle: PeftModel, path: str) -> Any:
    """`apply` visits the same modules in the same order wherever it starts."""
    seen: list[nn.Module] = []
    handle.get_base_model().apply(seen.append)
    return next(module for module in seen if module is handle.get_base_model().get_submodule(path))


def _named_modules_of_the_handle(handle: PeftModel, path: str) -> Any:
    own = {name: module for name, module in handle.named_modules(remove_duplicate=False) if not name.startswith("adapters")}
    return next(module for name, module in own.items() if name.endswith(f".{path}"))


def _in_a_module(handle: PeftModel, path: str) -> Any:
    """Where value heads and reward models keep it."""
    holder = nn.Module()
    holder.inner = _walk(handle, path, getattr)
    return holder.inner


ROUTES: dict[str, Callable[[PeftModel, str], Any]] = {
    "attributes": lambda handle, path: _walk(handle, path, getattr),
    "items": lambda handle, path: _walk(handle, path, _item),
    "items from the end": lambda handle, path: _walk(handle, path, _item_from_the_end),
    "slices": lambda handle, path: _walk(handle, path, _slice),
    "iteration": lambda handle, path: _walk(handle, path, _iterated),
    "children": _last_step(lambda parent, name: list(parent.children())[_position(parent, name)]),
    "named_children": _last_step(lambda parent, name: dict(parent.named_children())[name]),
    "_modules": _last_step(lambda parent, name: parent._modules[name]),
    "get_submodule": lambda handle, path: handle.get_submodule(path),
    "get_submodule of the base": lambda handle, path: handle.get_base_model().get_submodule(path),
    "get_base_model": lambda handle, path: _walk(handle.get_base_model(), path, getattr),
    "base_model.model": lambda handle, path: _walk(handle.base_model.model, path, getattr),
    "named_modules": _named_modules_of_the_handle,
    "named_modules of the base": lambda handle, path: dict(handle.get_base_model().named_modules(remove_duplicate=False))[path],
    "modules of the module around it": _last_step(lambda parent, name: dict(parent.named_modules())[name]),
    "apply": _applied,
    "a module list": lambda handle, path: nn.ModuleList([_walk(handle, path, getattr)])[0],
    "another module": _in_a_module,
    "a deep copy": lambda handle, path: copy.deepcopy(_walk(handle, path, getattr)),
}  # fmt: skip

# --- calls: of what was reached -------------------------------------------------------------------------------------


def _recomputed(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return checkpoint(part, *args, use_reentrant=False, **kwargs)


def _recomputed_reentrant(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As torch asks for: one input needs a gradient, keywords stay outside, results are tensors or tuples of them.

    A cache is empty in each run: one that holds results of the run before would lead the backward pass round in a circle.
    """

    def run(_: Tensor, *inner: Any) -> tuple[Tensor, ...]:
        own = {name: copy.deepcopy(value) if hasattr(value, "get_seq_length") else value for name, value in kwargs.items()}
        return tuple(tensors_of(part(*inner, **own)))

    return checkpoint(run, torch.ones((), requires_grad=True), *args, use_reentrant=True)


CALLS: dict[str, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    "call": lambda part, args, kwargs: part(*args, **kwargs),
    "forward": lambda part, args, kwargs: part.forward(*args, **kwargs),
    "__call__": lambda part, args, kwargs: part.__call__(*args, **kwargs),
    "partial": lambda part, args, kwargs: functools.partial(part, **kwargs)(*args),
    "the class's __call__": lambda part, args, kwargs: nn.Module.__call__(part, *args, **kwargs),
    "the class's forward": lambda part, args, kwargs: part.__class__.forward(part, *args, **kwargs),
    "functional_call": lambda part, args, kwargs: torch.func.functional_call(part, {}, args, kwargs),
    "recomputed": _recomputed,
    "recomputed, reentrant": _recomputed_reentrant,
    "checkpoint_wrapper": lambda part, args, kwargs: checkpoint_wrapper(part)(*args, **kwargs),
}

# --- runners: where the call runs -----------------------------------------------------------------------------------


def _in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def _in_two_threads(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(2) as pool:
        first, second = [future.result() for future in [pool.submit(call), pool.submit(call)]]
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(first), tensors_of(second), strict=True))
    return first


async def _coroutine(call: Callable[[], Any]) -> Any:
    await asyncio.sleep(0)
    return call()


RUNNERS: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "here": lambda call: call(),
    "in a thread": _in_a_thread,
    "in two threads": _in_two_threads,
    "in a coroutine": lambda call: asyncio.run(_coroutine(call)),
}

# --- modes ----------------------------------------------------------------------------------------------------------

MODES = {  # whether it trains, and what records gradients
    "eval, no_grad": (False, torch.no_grad),
    "eval, inference": (False, torch.inference_mode),
    "eval": (False, torch.enable_grad),
    "train": (True, torch.enable_grad),
    "train, no_grad": (True, torch.no_grad),
}


@contextmanager
def mode_of(name: str, *models: nn.Module):
    """The models in that mode, and in evaluation mode afterwards; gives the context manager of a call's gradients.

    Whether gradients are recorded belongs to a thread, so each call enters it where it runs.
    """
    trains, grad = MODES[name]
    for model in models:
        model.train(trains)
    try:
        yield grad
    finally:
        for model in models:
            model.eval()


def within(grad: Callable[[], AbstractContextManager[Any]], call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with gradients recorded or not."""

    def run() -> Any:
        with grad():
            return call()

    return run


# --- results --------------------------------------------------------------------------------------------------------


def tensors_of(result: Any) -> list[Tensor]:
    """The floating-point tensors in a result, in order; caches are not results."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    if isinstance(result, dict):
        result = list(result.values())
    return [tensor for item in result for tensor in tensors_of(item)] if isinstance(result, (list, tuple)) else []


def weighted_sum(result: Any) -> Tensor:
    """A number that depends on every entry of the result differently."""
    return sum(
        (tensor * torch.linspace(-1, 2, tensor.numel()).view_as(tensor).to(tensor)).sum() for tensor in tensors_of(result)
    )


class Cycle(Iterator[str]):
    """The values again and again, each time in another order, so that all of them come about equally often."""

    def __init__(self, values: Iterable[str]) -> None:
        self._values, self._left, self._draw = list(values), [], random.Random(0)

    def __next__(self) -> str:
        if not self._left:
            self._left = self._draw.sample(self._values, len(self._values))
        return self._left.pop()
