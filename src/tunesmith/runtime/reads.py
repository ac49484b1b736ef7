"""Weights that a model reads instead of calling their module act with the frame's adapters, too.

    F.linear(x, self.wte.weight)      nobody calls `wte` here: its site sees nothing

`nn.Module` looks a parameter up in the module's `_parameters`. Beside each site that dictionary is a `Parameters`: outside a
frame, and while the site itself runs, it answers like any other; else with what merging the frame's adapters would put there.
So a read gives the merged model's result, whatever computes with it. As after merging, another module that holds the same
tensor (a tied head) keeps its own value; and what a model keeps elsewhere than on the module is the base's.

Eager calls get a `LazyWeight`, because models also look at weights for their type alone; compiled ones drop what is unused.
"""

from __future__ import annotations

import functools
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..adapter import LinearAdapter, ModuleCopy, ParameterAdapter, SublayerAdapter
from ..bases.dense import product_fault
from ..bases.quantised import view_if_quantised
from ..bases.view import class_forward, module_view, view_of, view_type
from ..errors import UsageError
from ..kernels.fp32 import fp32_or_wider
from .frame import Frame, Place, current_frame, kept_reads, running_site, set_running
from .lazy_weight import LazyWeight

Acting = tuple[Any, ...]  # the adapters at one site


class Parameters(dict[str, Any]):
    """A module's `_parameters`, of which single ones are answered as the current frame's adapters make them."""

    def __init__(self, own: dict[str, Any], site: Place) -> None:
        super().__init__(own)
        self.site = site

    def __getitem__(self, name: str) -> Any:
        own = super().__getitem__(name)
        frame = current_frame()
        if frame is None or own is None or running_site() is self.site:
            return own
        return _read(self.site, frame, name, own)

    def __setitem__(self, name: str, value: Any) -> None:
        """Whoever swaps parameters and puts back what they read (`torch.func.functional_call`) puts the base's back."""
        super().__setitem__(name, value.own if isinstance(value, LazyWeight) else value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a base alone hold a plain dictionary."""
        return dict, (dict(self),)


class Computed:
    """Stands before the forward that computes a parametrized weight (`weight_norm`), and answers as `Parameters` does."""

    def __init__(self, parametrization: nn.Module, name: str, site: Place) -> None:
        self.parametrization = weakref.ref(parametrization)
        self.name, self.site = name, site

    def __call__(self) -> Any:
        own = class_forward(cast(nn.Module, self.parametrization()))()
        frame = current_frame()
        if frame is None or running_site() is self.site:
            return own
        return _read(self.site, frame, self.name, own)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.parametrization(), "forward")


def intercept(module: nn.Module, site: Place) -> None:
    """Answer reads of the module's parameters as the site's adapters make them."""
    if type(module._parameters) is dict:  # others (DeepSpeed's) answer reads in ways of their own
        module.__dict__["_parameters"] = Parameters(module._parameters, site)
    for name, parametrization in _parametrizations(module):
        parametrization.__dict__["forward"] = Computed(parametrization, name, site)


def release(module: nn.Module) -> None:
    """The inverse of `intercept`."""
    if isinstance(module._parameters, Parameters):
        module.__dict__["_parameters"] = dict(module._parameters)
    for _, parametrization in _parametrizations(module):
        if isinstance(parametrization.__dict__.get("forward"), Computed):
            del parametrization.__dict__["forward"]


def _parametrizations(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.parametrizations.items()) if is_parametrized(module) else []  # type: ignore[union-attr, operator]


def _read(at: Place, frame: Frame, name: str, own: Tensor) -> Any:
    """A parameter as a frame's adapters make it; the base's own where none of them changes it."""
    module = at.module()
    parts = [frame] if frame.mixture is None else frame.mixture.frames
    groups = [part.adapters.get(at, ()) for part in parts]
    if module is None or not any(_changes(module, adapters, name) for adapters in groups) or _is_swapped(module):
        return own
    if torch.compiler.is_compiling():
        return Change(module, at, frame, groups).value(name)
    kept = kept_reads()
    if (at, frame) not in kept:
        kept[at, frame] = Change(module, at, frame, groups)
    return LazyWeight(own, functools.partial(kept[at, frame].value, name, torch.is_grad_enabled()))


def _changes(module: nn.Module, adapters: Acting, name: str) -> bool:
    """Whether adapters at a module say what this parameter of it is."""
    kind = view_type(module)
    return any(
        isinstance(adapter, ModuleCopy)
        or (isinstance(adapter, ParameterAdapter) and name in adapter.names)
        or (isinstance(adapter, (LinearAdapter, SublayerAdapter)) and kind is not None and name in kind.names)
        for adapter in adapters
    )


def _is_swapped(module: nn.Module) -> bool:
    """Whether accelerate puts the module's weights in place for its call only, and itself reads what is there."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))


class Change:
    """What a frame's adapters make of one module's parameters: computed at most once with gradients, and once without.

    Args:
        groups: the adapters at the module, for each part of a mixed batch.
    """

    def __init__(self, module: nn.Module, at: Place, frame: Frame, groups: list[Acting]) -> None:
        self.module, self.at, self.fired = module, at, frame.fired
        self.groups = groups
        self.values: dict[bool, dict[str, Tensor]] = {}

    def value(self, name: str, recorded: bool = False) -> Tensor:
        """A parameter as the adapters make it.

        Args:
            recorded: whether gradients were recorded where it was read.

        Raises:
            UsageError: what the adapters compute is not a change of the module's weight, or its gradient would be lost.
        """
        outer = set_running(self.at)  # what is read of the module from here on is its own
        try:
            return self._values(name, recorded)[name]
        finally:
            set_running(outer)

    def _values(self, name: str, recorded: bool) -> dict[str, Tensor]:
        records = torch.is_grad_enabled()
        reason = self.fault()
        if reason is None and recorded and not records and self.trains:
            reason = "a fused kernel takes it, which would give its adapters no gradient (to evaluate, use torch.no_grad())"
        if reason:
            raise UsageError(
                f"the model reads the {name} of a {type(self.module).__name__} under adapters instead of calling the module, "
                f"and {reason}; leave it out of target_modules and modules_to_save"
            )
        if self.fired is not None:
            self.fired.add(self.at)
        if records not in self.values:
            self.values[records] = changed_parameters(self.module, self.groups[0])
        return self.values[records]

    def fault(self) -> str | None:
        if len(self.groups) > 1:
            return "one weight cannot serve rows with different adapters (run such a batch one adapter at a time)"
        return weight_fault(self.module, self.groups[0])

    @property
    def trains(self) -> bool:
        return any(p.requires_grad for group in self.groups for adapter in group for p in adapter.owner.parameters())


def weight_fault(module: nn.Module, adapters: Acting) -> str | None:
    """Why what these adapters compute is no change of the module's own weight; None where it is one."""
    kind = view_type(module)
    for adapter in adapters:
        if isinstance(adapter, SublayerAdapter) and kind is not None:
            return f"{type(adapter).__name__} changes what the module computes rather than its weight"
        if isinstance(adapter, LinearAdapter):
            view = view_of(module)
            reason = product_fault(view) or adapter.merge_fault(view) if adapter.mergeable else "it changes no weight"
            if reason is None and view_if_quantised(module) is not None:
                reason = "the weight is stored in a form that holds no adapter"
            if reason:
                return f"{type(adapter).__name__} cannot act there: {reason}"
    return None


def changed_parameters(module: nn.Module, adapters: Acting) -> dict[str, Tensor]:
    """`{parameter: value}` that merging these adapters would put into the module, as a part of the graph.

    Computed in at least fp32 and rounded once to the stored type, as merging does.
    """
    values: dict[str, Any] = dict(module_view(module, {})._parameters)
    for adapter in adapters:
        if isinstance(adapter, ParameterAdapter):
            values |= adapter.replaced(module_view(module, values))
    linear = [adapter for adapter in adapters if isinstance(adapter, LinearAdapter)]
    if linear:
        values |= _merged(view_of(module_view(module, values)), linear)
    for adapter in adapters:
        if isinstance(adapter, ModuleCopy):
            values |= adapter.replaced(module)
    return values


def _merged(view: Any, adapters: list[LinearAdapter]) -> dict[str, Tensor]:
    stored = view.weight()
    with _without_autocast(stored.device.type):
        wide = fp32_or_wider(view.dtype)
        weight, bias = view.weight_as(wide), view.bias
        bias = None if bias is None else bias.to(wide)
        for adapter in adapters:
            weight, bias = adapter.merge(weight, bias, view)
        merged = [view.stored(weight).to(stored.dtype), None if bias is None else bias.to(stored.dtype)]
    return {name: value for name, value in zip(view.names, merged) if value is not None}


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """A factor that is multiplied in 16 bits would round the weight it is added to."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
