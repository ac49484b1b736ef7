"""The check of the first step: every attached adapter can take effect.

An adapter that is never reached silently does nothing. So the first call of a handle with these adapters active, by
`forward` and by `generate`, in training and in eval mode, records what was reached. A module that did not run is no mistake by
itself: towers without input, layers that are dropped, experts without tokens. Refused is what can never act: a forward
replaced after attaching, a weight that is computed with although neither its module was called nor the weight read from it
(a kernel that keeps it elsewhere), and training in which nothing was reached.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..adapter import Adapter
from ..errors import UsageError, bullet_list
from ..runtime import site
from ..runtime.frame import Frame, Place
from ..runtime.lazy_weight import Used
from ..runtime.prefix import PrefixedStack
from .frames import Frames
from .untouched import same_buffers, tell_of_trained

logger = logging.getLogger(__name__)
NAMES_SHOWN = 5  # of modules that did not run


def checked(handle: Frames, frame: Frame, method: str, run: Callable[[Frame], Any]) -> Any:
    """The result of `run` in the frame, with the check that its adapters acted.

    Raises:
        UsageError: a site is gone, a module's weight was used past it, or (in training) no site was reached at all; or the
            base is sharded and the adapters are not.
    """
    trains = handle._trains
    adapters = [item for name in frame.names for item in handle.tree(name).items()]
    _check_sharding(handle)
    _check_installed(handle, {path for path, _ in adapters})
    if trains:
        tell_of_trained(handle.bare_base)
    with same_buffers(handle.bare_base) if trains else nullcontext():
        result = _run(handle, adapters, frame, method, run)
    handle._checked.add((frame.names, trains, method))
    return result


def _run(handle: Frames, adapters: list[tuple[str, Adapter]], frame: Frame, method: str, run: Callable[[Frame], Any]) -> Any:
    if any(_is_compiled(module) for module in handle.bare_base.modules()):
        return run(frame)  # what runs inside compiled layers cannot be seen, and to record it would compile them twice
    return _observed(handle.bare_base, adapters, frame, run, handle._trains and method == "forward")


def _observed(
    base: nn.Module, adapters: list[tuple[str, Adapter]], frame: Frame, run: Callable[[Frame], Any], trains: bool
) -> Any:
    fired: set[Place] = set()
    once, looked_up = _parameters_at(base, {path for path, _ in adapters})
    used = Used(once | looked_up)
    with used:
        result = run(frame.recording(fired))
    parts = [frame] if frame.mixture is None else frame.mixture.frames
    acting = [adapter for part in parts for at in fired for adapter in part.adapters.get(at, ())]
    reached = {adapter.owner for adapter in acting if isinstance(adapter, Adapter)}
    missed = sorted({path for path, adapter in adapters if adapter.owner not in reached})
    evident = {(path, is_lookup) for path in once.values() for is_lookup in (True, False)}
    evident |= {(path, True) for path in looked_up.values()}  # a tied head that is called is no use of the embedding
    bypassed = [path for path in missed if {(path, True), (path, False)} & evident & used.found]
    if bypassed:
        raise UsageError(
            "the weights of these modules were computed with, but neither were the modules called nor the weights read from "
            "them (something keeps them elsewhere), so their adapters would do nothing; leave them out of target_modules and "
            "modules_to_save:\n" + bullet_list(bypassed)
        )
    if trains and missed and not reached:
        raise UsageError(
            "none of the modules that carry adapters was reached, so nothing would train; name others in target_modules and "
            "modules_to_save:\n" + bullet_list(missed)
        )
    stacks = [at for at, acting in frame.adapters.items() if any(isinstance(a, PrefixedStack) for a in acting)]
    if any(at not in fired for at in stacks):
        raise UsageError("the prefix had no effect: the base ran its layers without calling the module that holds them")
    if missed and trains:
        shown = ", ".join(missed[:NAMES_SHOWN]) + (", ..." if len(missed) > NAMES_SHOWN else "")
        total = len({path for path, _ in adapters})
        logger.warning("%d of %d adapted modules did not run in the first step (unused parts): %s", len(missed), total, shown)
    return result


def _parameters_at(base: nn.Module, paths: set[str]) -> tuple[dict[Tensor, str], dict[Tensor, str]]:
    """`{parameter: path}` of these modules' parameters that no other module holds, and of shared embeddings."""
    holders: dict[Tensor, list[str]] = {}
    for path, module in base.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(parameter, []).append(path)
    once = {parameter: held[0] for parameter, held in holders.items() if len(held) == 1 and held[0] in paths}
    shared: dict[Tensor, str] = {}
    for parameter, held in holders.items():
        tables = [path for path in held if path in paths and isinstance(base.get_submodule(path), nn.Embedding)]
        if len(held) > 1 and tables:
            shared[parameter] = tables[0]
    return once, shared


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was applied to this very module, in place or around it."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def _check_installed(handle: Frames, paths: set[str]) -> None:
    gone = []
    for path in sorted(paths):
        module = handle.bare_base.get_submodule(path)
        if site.site_of(module) is None or site.fault(module):
            gone.append(path)
    if gone:
        raise UsageError(
            "the forward of these modules was replaced after the adapter was attached, so it would have no effect; "
            "replace it first, then attach:\n" + bullet_list(gone)
        )


def _check_sharding(handle: Frames) -> None:
    """Under FSDP2 adapters must be sharded with the base: otherwise each rank silently keeps its own gradients."""
    if isinstance(handle, FSDPModule):
        return  # it shards everything below it, and has already gathered what it calls itself
    base_sharded = any(isinstance(p, DTensor) for p in handle.bare_base.parameters())
    plain = [name for name, p in handle.adapters.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if base_sharded and plain and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UsageError(
            f"the base is sharded but {len(plain)} adapter tensors are not, so ranks would train different adapters; "
            "call fully_shard on the handle itself, after its layers"
        )
