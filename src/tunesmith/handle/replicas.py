"""Handles under `nn.DataParallel`, which calls a shallow copy of every module on each device.

In a copy the tensors are attributes rather than parameters, and whatever refers to another module (sites, frames, adapters
that follow others) still refers to the original, whose tensors are on another device. A copied handle mends both before it
runs; gradients flow through the copied tensors into the original ones.
"""

from __future__ import annotations

from torch import nn

from ..adapter import Adapter
from ..runtime import site
from ..runtime.own_state import OwnState
from .frames import Frames


def mend(handle: Frames) -> None:
    """Let everything in a copied handle refer to the copies."""
    tuner = handle.__dict__["_modules"].pop("base_model")  # replicate() registers copies of what the handle shows
    handle.__dict__["bare_base"] = tuner._modules["model"]
    handle._own = OwnState(handle.bare_base)
    for module in (handle, *handle.bare_base.modules(), *handle.adapters.modules()):
        _own_tensors(module)
        site.move(module)
    copies = {id(m.__dict__["original"]): m for m in handle.adapters.modules() if isinstance(m, Adapter)}
    for name in handle.adapters:
        tree = handle.tree(name)
        for _, adapter in tree.items():
            if adapter.owner is not adapter:
                adapter.follow(copies[id(adapter.owner)])
            if adapter.shared is not None:
                adapter.__dict__["shared"] = tree.shared
    handle._forget()
    del handle.__dict__["_is_replica"]


def _own_tensors(module: nn.Module) -> None:
    """Make attributes parameters again, in name only: they are not leaves. Its hooks become its own."""
    for name, tensor in module.__dict__.pop("_former_parameters", {}).items():
        module.__dict__.pop(name, None)
        module._parameters[name] = tensor
    module._forward_pre_hooks = module._forward_pre_hooks.copy()
