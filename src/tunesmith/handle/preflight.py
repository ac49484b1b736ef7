"""The check of the first step: every planned adapter really acts.

An adapter that is never reached does nothing and says nothing: attention's `out_proj` whose weight is read past its
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
    """What `run` gives in the frame, after which every site must have been reached.

    Raises:
        UsageError: a site is gone, was passed by although the module around it ran, or (in training) no site was
            reached at all; or the base is sharded and the adapters are not.
    """
    trains = handle.trains
    paths = {path for name in frame.names for path, _ in handle.tree(name).items()}
    _check_sharding(handle)
    _check_installed(handle, paths)
    fired: set[Place] = set()
    ran: set[str] = set()
    frame = frame.noting(fired)
    parents = {path.rpartition(".")[0] for path in paths}
    hooks = [_note(handle.base_model.get_submodule(parent), parent, frame, ran) for parent in parents]
    try:
        result = run(frame)
    finally:
        for hook in hooks:
            hook.remove()
    fired_paths = {path for path in paths if site.site_of(handle.base_model.get_submodule(path)) in fired}
    missed = sorted(paths - fired_paths - _served_by_others(handle, fired_paths))
    passed_by = [path for path in missed if path.rpartition(".")[0] in ran]
    if passed_by or (trains and missed and len(missed) == len(paths)):
        raise UsageError(
            "these modules carry adapters but were not called, so their adapters would do nothing (their weights are "
            "read directly, or a fused kernel replaces them); leave them out of target_modules and modules_to_save:\n"
            + bullet_list(passed_by or missed)
        )
    bypassed = [at for at, acting in frame.adapters.items() if any(isinstance(a, PrefixedStack) for a in acting)]
    if any(at not in fired for at in bypassed):
        raise UsageError("the prefix did not act: the base computed its layers without the module that holds them")
    if missed and trains:
        logger.warning("%d of %d adapted modules did not run in the first step (unused parts)", len(missed), len(paths))
    handle.checked.add((frame.names, trains))
    return result


def _served_by_others(handle: Frames, fired: set[str]) -> set[str]:
    """Modules whose trained rows acted elsewhere: of tied embeddings, a model may call another than it names."""
    adapters = [item for name in handle.effective for item in handle.tree(name).items()]
    acted = {adapter.owner for path, adapter in adapters if path in fired}
    return {path for path, adapter in adapters if adapter.owner in acted}


def _note(module: nn.Module, path: str, frame: Frame, ran: set[str]) -> Any:
    """A hook that notes when the module runs in this very call, not in another thread's."""
    return module.register_forward_pre_hook(lambda *_: ran.add(path) if current_frame() is frame else None)


def _check_installed(handle: Frames, paths: set[str]) -> None:
    gone = []
    for path in sorted(paths):
        module = handle.base_model.get_submodule(path)
        if site.site_of(module) is None or site.fault(module):
            gone.append(path)
    if gone:
        raise UsageError(
            "the forward of these modules was replaced after the adapter was attached, so it would not act; "
            "replace it first, then attach:\n" + bullet_list(gone)
        )


def _check_sharding(handle: Frames) -> None:
    """Under FSDP2 adapters must be sharded with the base: else each rank keeps gradients of its own, silently."""
    if isinstance(handle, FSDPModule):
        return  # it shards all that is below it, and has gathered what it calls itself by now
    base_sharded = any(isinstance(p, DTensor) for p in handle.base_model.parameters())
    plain = [name for name, p in handle.adapters.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if base_sharded and plain and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UsageError(
            f"the base is sharded but {len(plain)} adapter tensors are not, so ranks would train different adapters; "
            "call fully_shard on the handle itself, after its layers"
        )
