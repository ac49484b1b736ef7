"""Methods that act on the training itself: after each optimiser step, and on the loss.

Steps are observed through torch's own hook on every optimiser, so no training loop has to call anything. A step counts
for an adapter when the optimiser holds its parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..adapter import ScheduledAdapter
from ..attach.tree import AdapterTree
from ..config import PeftConfig
from ..errors import UsageError
from ..registry import adapter_type
from .state import HandleState

_observed: weakref.WeakSet[HandleState] = weakref.WeakSet()
_hooks: list[Any] = []


@dataclass
class Progress:
    """Where an adapter's schedule is.

    Args:
        step: number of the last optimiser step.
        seen: the hook has counted this step, and no call has named it since.
        by_hand: a call came before the hook saw its step (or the hook sees none), so only calls count.
    """

    step: int = 0
    seen: bool = False
    by_hand: bool = False


def observe_steps(handle: HandleState, configs: Iterable[PeftConfig]) -> None:
    """Observe the optimiser steps of a handle, if one of these adapters of it is scheduled."""
    if not any(issubclass(adapter_type(config), ScheduledAdapter) for config in configs):
        return
    _observed.add(handle)
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_optimiser_step))


def _after_optimiser_step(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    if not _observed:
        return
    stepped = {parameter for group in optimiser.param_groups for parameter in group["params"]}
    for handle in list(_observed):
        for name in _scheduled(handle):
            tree = handle.tree(name)
            progress = _progress(tree)
            if not progress.by_hand and any(parameter in stepped for parameter in tree.parameters()):
                progress.step += 1
                progress.seen = True
                _run(handle, name, progress.step, observe=True)


def update_and_allocate(handle: HandleState, global_step: int) -> None:
    """Run the active adapters' schedules for `global_step`, unless the hook did for this optimiser step.

    Raises:
        UsageError: no active adapter has a schedule.
    """
    names = _scheduled(handle)
    if not names:
        raise UsageError("no active adapter has a budget to allocate; this call is for AdaLoRA")
    for name in names:
        progress = _progress(handle.tree(name))
        if not (progress.seen and progress.step == global_step):
            _run(handle, name, global_step, observe=not progress.seen)
        progress.by_hand = progress.by_hand or not progress.seen
        progress.step, progress.seen = global_step, False


def penalties(handle: HandleState, names: tuple[str, ...]) -> tuple[Callable[[], Tensor], ...]:
    """What the named adapters add to the loss while they train."""
    kinds = [(adapter_type(handle.peft_config[name]), name) for name in names]
    return tuple(
        partial(kind.penalty, handle.tree(name).adapted(), handle.peft_config[name])
        for kind, name in kinds
        if issubclass(kind, ScheduledAdapter) and not handle.peft_config[name].inference_mode
    )


def with_penalties(result: Any, added: tuple[Callable[[], Tensor], ...]) -> Any:
    """The model's result with the penalties added to its loss, if it has one."""
    if isinstance(result, tuple):
        loss = result[0] if result else None
    else:
        loss = result.get("loss") if isinstance(result, dict) else None
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        return result
    total = loss + sum(penalty().to(loss) for penalty in added)
    if isinstance(result, tuple):
        return (total, *result[1:])
    result["loss"] = total
    return result


def _scheduled(handle: HandleState) -> list[str]:
    """The active adapters with a schedule that train."""
    configs = {name: handle.peft_config[name] for name in handle._active}
    trained = {name: config for name, config in configs.items() if not config.inference_mode}
    return [name for name, config in trained.items() if issubclass(adapter_type(config), ScheduledAdapter)]


def _run(handle: HandleState, name: str, step: int, observe: bool) -> None:
    config = handle.peft_config[name]
    kind, adapters = adapter_type(config), handle.tree(name).adapted()
    if observe:
        kind.observe_step(adapters, config, step)
    kind.allocate(adapters, config, step)


def go_on(old: AdapterTree, new: AdapterTree) -> None:
    """Let an adapter's schedule go on where that of the one whose place it takes is."""
    new.__dict__["progress"] = _progress(old)


def _progress(tree: AdapterTree) -> Progress:
    return cast(Progress, tree.__dict__.setdefault("progress", Progress()))
