"""Adapters into weights and back out.

Merging computes in at least fp32, rounds once to the stored type and puts *new* parameters in place of the old ones;
the old ones are kept, so unmerging restores the very tensors, ties included. Quantised weights are requantised, and the
rounding error is logged.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..adapter import Adapter, LinearAdapter, ModuleCopy, ParameterAdapter
from ..attach.tree import AdapterTree
from ..bases import architecture
from ..bases.dense import product_fault
from ..bases.quantised import QuantisedView, view_if_quantised
from ..bases.view import BaseView, view_of
from ..errors import UsageError
from ..kernels.fp32 import fp32_or_wider

logger = logging.getLogger(__name__)

Originals = dict[tuple[str, str], Tensor]  # {(module path, parameter or buffer): what merging replaced}


def check(base: nn.Module, tree: AdapterTree) -> None:
    """Find before anything changes what would keep `tree` from being merged.

    Raises:
        UsageError: a weight is not there to be changed (offloaded), an adapter holds values that are not finite, or
            what it computes is not a change of its module's weight.
    """
    for path, adapter in tree.items():
        module = base.get_submodule(path)
        if any(p.device.type == "meta" for p in module.parameters()):
            raise UsageError(f"{path} is offloaded, so its weight cannot be merged; load the base without offloading")
        if any(not torch.isfinite(p).all() for p in adapter.parameters()):
            raise UsageError(f"the adapter at {path} has non-finite values and cannot be merged")
        reason = _merge_fault(adapter, view_of(module)) if isinstance(adapter, LinearAdapter) else None
        if reason:
            raise UsageError(f"{path} cannot be merged: {reason}")


def _merge_fault(adapter: LinearAdapter, view: BaseView) -> str | None:
    if view.names[0] not in view.module._parameters:
        return "its weight is computed from other parameters (a parametrization, such as weight_norm); remove that first"
    return product_fault(view) or adapter.merge_fault(view)


def check_order(base: nn.Module, trees: dict[str, AdapterTree]) -> None:
    """What changes parameters acts innermost, so it must be merged before what changes the module around them.

    Args:
        trees: adapters by name, in the order of their merging.

    Raises:
        UsageError: an adapter changes a parameter that an earlier one has changed as a module's weight or bias.
    """
    innermost = {
        name: {
            (path, leaf) for path, adapter in tree.items() if isinstance(adapter, ParameterAdapter) for leaf in adapter.names
        }
        for name, tree in trees.items()
    }
    paths = {path for found in innermost.values() for path, _ in found}
    changed: set[tuple[str, str]] = set()
    for name, tree in trees.items():
        for path, leaf in sorted(innermost[name] & changed):
            order = ", ".join(f'"{each}"' for each in (name, *(other for other in trees if other != name)))
            raise UsageError(
                f'"{name}" replaces {path}.{leaf}, which another adapter changes; merge it before the others: {order}'
            )
        for path, adapter in tree.items():
            if isinstance(adapter, LinearAdapter) and path in paths:
                changed.update((path, leaf) for leaf in _merged_values(base.get_submodule(path), adapter))


class HasAdapters(Protocol):
    """An adapter's tree, or a part of one."""

    def items(self) -> Iterator[tuple[str, Adapter]]: ...


def into_weights(base: nn.Module, trees: Sequence[HasAdapters], safe: bool, keep: bool) -> Originals:
    """Replace the parameters of `base` that checked `trees` change; returns what was replaced when `keep` is set.

    Raises:
        UsageError: with `safe`, a merged value is not finite; the base is then unchanged.
    """
    originals: Originals = {}
    rounding = Rounding()
    try:
        for path, adapter, followers in (item for tree in trees for item in _together(base, tree)):
            for name, value in _merged_values(base.get_submodule(path), adapter).items():
                if safe and not torch.isfinite(value).all():
                    raise UsageError(f"merging produces non-finite values in {path}.{name}; nothing was merged")
                old = _put(base, [path, *followers], name, value, rounding)
                if keep or safe:
                    for changed in (path, *followers):
                        originals.setdefault((changed, name), old)
    except Exception:
        restore(base, originals)
        raise
    rounding.report()
    return originals if keep else {}


class Rounding:
    """How much of what adapters change is lost where merged weights are quantised again."""

    def __init__(self) -> None:
        self.modules = 0
        self.lost = self.change = 0.0  # sums of squares

    def add(self, before: Tensor, merged: Tensor, after: Tensor) -> None:
        self.modules += 1
        self.lost += (after - merged).square().sum().item()
        self.change += (merged - before).square().sum().item()

    def report(self) -> None:
        if self.modules:
            logger.warning(
                "merging requantised %d weights, with a rounding error %.3g times the size of the adapters' change; "
                "merge_and_unload() gives a dense model without it",
                self.modules, (self.lost / self.change) ** 0.5 if self.change else 0.0,
            )  # fmt: skip


def restore(base: Any, originals: Originals) -> None:
    """Put replaced parameters and buffers back, the same objects."""
    for (path, name), original in originals.items():
        owner, leaf = _owner(base, path, name)
        (owner._buffers if leaf in owner._buffers else owner._parameters)[leaf] = original
        quantised = view_if_quantised(owner)
        if quantised is not None:
            quantised.adopt()
    if hasattr(base, "config") and base.__dict__.pop("_untied_by_tunesmith", False):
        architecture.tie_embeddings(base.config, True)


def plain_copy(base: nn.Module) -> nn.Module:
    """A deep copy of the base; sites reduce to the plain forward in copies."""
    return copy.deepcopy(base)


@torch.no_grad()
def _merged_values(module: Any, adapter: Adapter) -> dict[str, Tensor]:
    if isinstance(adapter, (ParameterAdapter, ModuleCopy)):
        return {name: value.detach().clone() for name, value in adapter.replaced(module).items()}
    assert isinstance(adapter, LinearAdapter)
    view: BaseView = view_of(module)
    wide = fp32_or_wider(view.dtype)
    bias = None if view.bias is None else view.bias.to(wide)
    weight, new_bias = adapter.merge(view.weight_as(wide), bias, view)
    values = {"weight": weight if view_if_quantised(module) else view.stored(weight).to(module.weight.dtype)}
    if new_bias is not None and module._parameters.get("bias") is None:
        raise UsageError(
            f"{type(adapter).__name__} adds a bias to a {type(module).__name__} that has none, so it cannot be merged; "
            "use the handle unmerged"
        )
    if new_bias is not None and new_bias is not bias:
        values["bias"] = new_bias.to(module.bias.dtype)
    return values


def _together(base: nn.Module, tree: HasAdapters) -> Iterator[tuple[str, Adapter, list[str]]]:
    """`(path, adapter, followers)`: followers hold the same weight and use the same tensors, so they stay tied."""
    items = list(tree.items())
    following: dict[Adapter, list[tuple[str, Adapter]]] = {}
    for path, adapter in items:
        following.setdefault(adapter.owner, []).append((path, adapter))
    done: set[Adapter] = set()
    for path, adapter in items:
        if adapter in done:
            continue
        together = following[adapter.owner]
        if len(together) > 1:
            weight = base.get_submodule(path).weight
            together = [(other, each) for other, each in together if base.get_submodule(other).weight is weight]
        done.update(each for _, each in together)
        yield path, adapter, [other for other, _ in together if other != path]


def _put(base: nn.Module, paths: list[str], name: str, value: Tensor, rounding: Rounding) -> Tensor:
    """Set one parameter or buffer, which the modules at `paths` share, to a new tensor; returns the old one."""
    owner, leaf = _owner(base, paths[0], name)
    quantised = view_if_quantised(owner) if leaf == "weight" else None
    if quantised is not None:
        return _put_quantised(quantised, value, rounding)
    if leaf in owner._buffers:
        old = owner._buffers[leaf]
        owner._buffers[leaf] = value
        return old
    old = owner._parameters[leaf]
    _untie(base, old, len(paths))
    new = nn.Parameter(value, requires_grad=False)
    for path in paths:
        owner, leaf = _owner(base, path, name)
        owner._parameters[leaf] = new
    return old


def _put_quantised(view: QuantisedView, merged: Tensor, rounding: Rounding) -> Tensor:
    merged, old = merged.float(), view.module.weight
    before = view.weight_as(torch.float32)
    view.module._parameters["weight"] = view.parameter(merged)
    view.adopt()
    rounding.add(before, merged, view.weight_as(torch.float32))
    return old


def _owner(base: nn.Module, path: str, name: str) -> tuple[Any, str]:
    """The module that holds the tensor `name` of the module at `path`, and the tensor's name there."""
    owner, _, leaf = name.rpartition(".")
    return base.get_submodule(f"{path}.{owner}" if owner else path), leaf


def _untie(base: nn.Module, old: Tensor, changed: int) -> None:
    """When more modules share `old` than change: say so in the config, or it reloads wrongly."""
    shared = [name for name, p in base.named_parameters(remove_duplicate=False) if p is old]
    config = architecture.config_of(base)
    if len(shared) > changed and architecture.ties_embeddings(config):
        logger.warning("merging unties %s; config.tie_word_embeddings is now False", " and ".join(shared))
        architecture.tie_embeddings(config, False)
        base.__dict__["_untied_by_tunesmith"] = True
