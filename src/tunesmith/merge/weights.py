"""Adapters into weights and back out.

Merging computes in at least fp32, rounds once to the stored type and puts *new* parameters in place of the old ones;
the old ones are kept, so unmerging restores the very tensors, ties included. Quantised weights are requantised, and the
rounding error is logged.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..adapter import Adapter, LinearAdapter, ModuleCopy, ParameterAdapter
from ..attach.tree import AdapterTree
from ..bases import architecture
from ..bases.dense import product_fault
from ..bases.quantised import QuantisedView, view_if_quantised
from ..bases.stored_tensors import FLOAT8, is_placeholder
from ..bases.view import BaseView, view_of
from ..errors import UsageError
from ..kernels.fp32 import fp32_or_wider

logger = logging.getLogger(__name__)

Types = Mapping[torch.dtype, torch.dtype]
Originals = dict[tuple[str, str], Tensor]  # {(module path, parameter or buffer): what merging replaced}


def check(base: nn.Module, tree: AdapterTree) -> None:
    """Find before anything changes what would keep `tree` from being merged.

    Raises:
        UsageError: a weight is not there to be changed (offloaded), an adapter holds values that are not finite, or
            what it computes is not a change of its module's weight.
    """
    for path, adapter in tree.items():
        module = base.get_submodule(path)
        if any(is_placeholder(p) for p in module.parameters()):
            raise UsageError(
                f"{path} is offloaded or partitioned, so its weight cannot be merged; load the base whole and adapt that"
            )
        if any(not torch.isfinite(p).all() for p in adapter.parameters()):
            raise UsageError(f"the adapter at {path} has non-finite values and cannot be merged")
        reason = _merge_fault(adapter, view_of(module)) if isinstance(adapter, LinearAdapter) else None
        if reason:
            raise UsageError(f"{path} cannot be merged: {reason}")


def _merge_fault(adapter: LinearAdapter, view: BaseView) -> str | None:
    if view.names[0] not in view.module._parameters:
        return "its weight is computed from other parameters (a parametrization, such as weight_norm); remove that first"
    stored = view.module._parameters[view.names[0]].dtype
    if stored in FLOAT8 and not isinstance(view, QuantisedView):
        return (
            f"its weight is stored as {stored}, which would round most of the change away; convert the base, as with "
            ".to(torch.bfloat16)"
        )
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


def into_weights(base: nn.Module, trees: Sequence[HasAdapters], keep: bool, types: Types | None = None) -> Originals:
    """Replace the parameters of `base` that checked `trees` change; returns what was replaced when `keep` is set.

    Without `keep` one tree is computed twice, first to look at it, so that old and new weights are never in memory together.

    Args:
        types: for the type of a value that is replaced that of the new one; by default the same.

    Raises:
        UsageError: a merged value is not finite; the base is then unchanged.
    """
    originals: Originals = {}
    rounding = Rounding()
    can_go_back = keep or len(trees) > 1
    if not can_go_back:
        for _ in _changes(base, trees, types or {}):
            pass
    try:
        for paths, name, value in _changes(base, trees, types or {}):
            for changed, old in _put(base, paths, name, value, rounding).items():
                if can_go_back:
                    originals.setdefault(changed, old)
    except Exception:
        restore(base, originals)
        raise
    rounding.report()
    return originals if keep else {}


def _changes(base: nn.Module, trees: Sequence[HasAdapters], types: Types) -> Iterator[tuple[list[str], str, Tensor]]:
    """`(paths of the modules that share it, its name there, new value)` of everything that merging replaces."""
    for path, adapter, followers in (item for tree in trees for item in _together(base, tree)):
        for name, value in _merged_values(base.get_submodule(path), adapter).items():
            owner, leaf = _owner(base, path, name)
            before = getattr(owner, leaf)
            if not (leaf == "weight" and view_if_quantised(owner)):
                value = value.to(types.get(before.dtype, before.dtype))
            check_finite(f"{path}.{name}", value, before)
            yield [path, *(followers if name == "weight" else ())], name, value  # all that followers share


def check_finite(name: str, value: Tensor, before: Tensor) -> None:
    """
    Raises:
        UsageError: `value`, about to replace `before`, holds infinities or NaN that `before` does not.
    """
    finite = torch.isfinite(value)
    if not finite.all() and not (before.shape == value.shape and (finite | ~torch.isfinite(before.float())).all()):
        raise UsageError(
            f"merging produces non-finite values in {name} ({value.dtype}); nothing was merged; merge in a type with a wider "
            "range, as with merge_and_unload(dtype=torch.bfloat16), or use the handle unmerged"
        )


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
    """`{parameter or buffer: value}`, in the type in which it was computed."""
    if isinstance(adapter, (ParameterAdapter, ModuleCopy)):
        return {name: value.detach().clone() for name, value in adapter.replaced(module).items()}
    assert isinstance(adapter, LinearAdapter)
    view: BaseView = view_of(module)
    wide = fp32_or_wider(view.dtype)
    bias = None if view.bias is None else view.bias.to(wide)
    weight, new_bias = adapter.merge(view.weight_as(wide), bias, view)
    values = {"weight": weight if view_if_quantised(module) else view.stored(weight)}
    if new_bias is not None and module._parameters.get("bias") is None:
        raise UsageError(
            f"{type(adapter).__name__} adds a bias to a {type(module).__name__} that has none, so it cannot be merged; "
            "use the handle unmerged"
        )
    if new_bias is not None and new_bias is not bias:
        values["bias"] = new_bias
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


def _put(base: nn.Module, paths: list[str], name: str, value: Tensor, rounding: Rounding) -> Originals:
    """Set one parameter or buffer, which the modules at `paths` share, to a new tensor; returns what that replaced."""
    owner, leaf = _owner(base, paths[0], name)
    quantised = view_if_quantised(owner) if leaf == "weight" else None
    if quantised is not None:
        return {(paths[0], name): _put_quantised(quantised, value, rounding)}
    if leaf in owner._buffers:
        old = owner._buffers[leaf]
        owner._buffers[leaf] = value
        return {(paths[0], name): old}
    old = owner._parameters[leaf]
    new = nn.Parameter(value, requires_grad=False)
    for path in paths:
        owner, leaf = _owner(base, path, name)
        owner._parameters[leaf] = new
    copied = {(path, leaf): old for path in _untie(base, leaf, old, paths)}
    return {**{(path, name): old for path in paths}, **copied}


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


def _untie(base: nn.Module, leaf: str, old: Tensor, changed: list[str]) -> list[str]:
    """When other modules hold `old` as their `leaf`, too: say so in the config, or the model reloads wrongly.

    Returns:
        Paths of modules whose value was copied. Of several that stay tied, all but one get a copy: with the config saying
        that nothing is tied, each is loaded for itself.
    """
    others = [path for path, module in base.named_modules() if module._parameters.get(leaf) is old]
    config = architecture.config_of(base)
    if not others or not architecture.ties_embeddings(config):
        return []
    logger.warning("merging unties %s; config.tie_word_embeddings is now False", " and ".join((*changed, *others)))
    architecture.tie_embeddings(config, False)
    base.__dict__["_untied_by_tunesmith"] = True
    for path in others[1:]:
        base.get_submodule(path)._parameters[leaf] = nn.Parameter(old.detach().clone(), requires_grad=False)
    return others[1:]
