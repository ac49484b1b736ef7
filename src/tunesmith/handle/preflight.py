"""The check of the first step: every attached adapter really takes effect.

An adapter that is never reached silently does nothing: attention's `out_proj` whose weight is read past its
forward, fused kernels, a forward patched after attaching. So the first forward of a handle with these adapters active,
one in training and one in eval mode, records which sites were reached, and which modules around them ran.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import UsageError, bullet_list
from ..runtime import site
from ..runtime.frame import Frame, Place, current_frame
from ..runtime.prefix import PrefixedStack
from .frames import Frames

logger = logging.getLogger(__name__)


def checked(handle: Frames, frame: Frame, run: Callable[[Frame], Any]) -> Any:
    """The result of `run` in the frame, with the check that it reached every site.

    Raises:
        UsageError: a site is gone, was bypassed although the module that contains it ran, or (in training) no site was
            reached at all; or the base is sharded and the adapters are not.
    """
    trains = handle._trains
    paths = {path for name in frame.names for path, _ in handle.tree(name).items()}
    _check_sharding(handle)
    _check_installed(handle, paths)
    fired: set[Place] = set()
    ran: set[str] = set()
    frame = frame.recording(fired)
    parents = {path.rpartition(".")[0] for path in paths}
    hooks = [_record_run(handle.bare_base.get_submodule(parent), parent, frame, ran) for parent in parents]
    try:
        result = run(frame)
    finally:
        for hook in hooks:
            hook.remove()
    fired_paths = {path for path in paths if site.site_of(handle.bare_base.get_submodule(path)) in fired}
    missed = sorted(paths - fired_paths - _served_by_others(handle, fired_paths))
    bypassed = [path for path in missed if path.rpartition(".")[0] in ran]
    if bypassed or (trains and missed and len(missed) == len(paths)):
        raise UsageError(
            "these modules carry adapters but were not called, so their adapters would do nothing (their weights are "
            "read directly, or a fused kernel replaces them); leave them out of target_modules and modules_to_save:\n"
            + bullet_list(bypassed or missed)
        )
    stacks = [at for at, adapters in frame.adapters.items() if any(isinstance(a, PrefixedStack) for a in adapters)]
    if any(at not in fired for at in stacks):
        raise UsageError("the prefix had no effect: the base ran its layers without calling the module that holds them")
    if missed and trains:
        logger.warning("%d of %d adapted modules did not run in the first step (unused parts)", len(missed), len(paths))
    handle._checked.add((frame.names, trains))
    return result


def _served_by_others(handle: Frames, fired: set[str]) -> set[str]:
    """Modules whose trained rows took effect elsewhere: with tied embeddings a model may call another module than it names."""
    adapters = [item for name in handle._effective for item in handle.tree(name).items()]
    reached = {adapter.owner for path, adapter in adapters if path in fired}
    return {path for path, adapter in adapters if adapter.owner in reached}


def _record_run(module: nn.Module, path: str, frame: Frame, ran: set[str]) -> Any:
    """A hook that records whether the module runs in this call, and not in another thread's."""
    return module.register_forward_pre_hook(lambda *_: ran.add(path) if current_frame() is frame else None)


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
