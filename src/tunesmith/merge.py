"""Adapters into weights and back out.

Merging computes in at least fp32, rounds once to the stored type and puts *new* parameters in place of the old ones;
the old ones are kept, so unmerging restores the very tensors, ties included.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn

from .attach import AdapterTree
from .bases.view import BaseView, view_of
from .contracts import Adapter, LinearAdapter, ModuleCopy, ParameterAdapter
from .errors import UsageError

logger = logging.getLogger(__name__)

Originals = dict[tuple[str, str], nn.Parameter]  # {(module path, parameter): what merging replaced}


def into_weights(base: nn.Module, tree: AdapterTree, safe: bool, keep: bool) -> Originals:
    """Replace the parameters of `base` that `tree` changes; returns what was replaced when `keep` is set.

    Raises:
        UsageError: a weight is not there to be changed (offloaded), the method cannot be merged, or, with `safe`, a
            merged value is not finite; the base is then as it was, provided `keep` or nothing was replaced yet.
    """
    for path, adapter in tree.items():
        if any(p.device.type == "meta" for p in base.get_submodule(path).parameters()):
            raise UsageError(f"{path} is offloaded, so its weight is not here to be merged; load the base without offloading")
        if any(not torch.isfinite(p).all() for p in adapter.parameters()):
            raise UsageError(f"the adapter at {path} holds values that are not finite; it cannot be merged")
    originals: Originals = {}
    try:
        for path, adapter in tree.items():
            for name, value in _merged_values(base.get_submodule(path), adapter, path).items():
                if safe and not torch.isfinite(value).all():
                    raise UsageError(f"merging gives values that are not finite in {path}.{name}; nothing was merged")
                old = _put(base, path, name, value)
                if old is not None and (keep or safe):
                    originals[path, name] = old
    except Exception:
        restore(base, originals)
        raise
    return originals if keep else {}


def restore(base: nn.Module, originals: Originals) -> None:
    """Put replaced parameters back, the same objects."""
    for (path, name), parameter in originals.items():
        owner, _, leaf = name.rpartition(".")
        base.get_submodule(f"{path}.{owner}" if owner else path)._parameters[leaf] = parameter
    if hasattr(base, "config") and base.__dict__.pop("_untied_by_tunesmith", False):
        base.config.tie_word_embeddings = True


def plain_copy(base: nn.Module) -> nn.Module:
    """A deep copy of the base; sites reduce to the plain forward in copies."""
    return copy.deepcopy(base)


@torch.no_grad()
def _merged_values(module: nn.Module, adapter: Adapter, path: str) -> dict[str, Tensor]:
    if isinstance(adapter, (ParameterAdapter, ModuleCopy)):
        return {name: value.detach().clone() for name, value in adapter.replaced().items()}
    assert isinstance(adapter, LinearAdapter)
    view: BaseView = view_of(module)
    wide = torch.promote_types(view.weight().dtype, torch.float32)
    bias = view.bias
    try:
        weight, new_bias = adapter.merge(view.weight().to(wide), None if bias is None else bias.to(wide), view)
    except NotImplementedError as error:
        raise UsageError(f"{path} cannot be merged: {error}") from error
    values = {"weight": view.stored(weight).to(module.weight.dtype)}
    if bias is not None and new_bias is not None:
        values["bias"] = new_bias.to(bias.dtype)
    return values


def _put(base: nn.Module, path: str, name: str, value: Tensor) -> nn.Parameter | None:
    """Set one parameter (or buffer) to a new tensor; the old parameter, or None for a buffer."""
    owner_path, _, leaf = name.rpartition(".")
    owner = base.get_submodule(f"{path}.{owner_path}" if owner_path else path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
        return None
    old = owner._parameters[leaf]
    _untie(base, old)
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    return old


def _untie(base: nn.Module, old: Tensor) -> None:
    """When `old` is shared by several modules, only this one changes: say so in the config, or it reloads wrongly."""
    shared = [name for name, p in base.named_parameters(remove_duplicate=False) if p is old]
    config = getattr(base, "config", None)
    if len(shared) > 1 and getattr(config, "tie_word_embeddings", False):
        logger.warning("merging unties %s; config.tie_word_embeddings is now False", " and ".join(shared))
        config.tie_word_embeddings = False
        base.__dict__["_untied_by_tunesmith"] = True
