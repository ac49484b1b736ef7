"""Adapters into quantised bases: into a dense model of 16 bits, or rounded to the stored form again where that is asked for.

A merged weight differs from the stored one by less than the stored form resolves, so rounding it again throws a part of the
adapter away. The dense model keeps it: each module is decoded to fp32, merged and rounded once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter, LinearAdapter, ModuleCopy
from ..attach.tree import AdapterTree
from ..bases.architecture import drop_quantised_marks
from ..bases.precision import usual_dtype
from ..bases.prepare import WIDENED, restore_dtypes
from ..bases.quantised import dense_module, quantised_views
from ..paths import is_inside
from .weights import check_finite, into_weights

logger = logging.getLogger(__name__)


@dataclass
class Part:
    """The adapters of a tree at some paths, in the tree's order."""

    tree: AdapterTree
    paths: set[str]
    inside: bool

    def items(self) -> Iterator[tuple[str, Adapter]]:
        return ((path, adapter) for path, adapter in self.tree.items() if (path in self.paths) == self.inside)


def changed(base: nn.Module, trees: Iterable[AdapterTree]) -> list[str]:
    """Paths of quantised modules whose weights these adapters change."""
    quantised = [path for path, _ in quantised_views(base)]
    linear = {path for tree in trees for path, adapter in tree.items() if isinstance(adapter, LinearAdapter)}
    whole = {path for tree in trees for path, adapter in tree.items() if isinstance(adapter, ModuleCopy)}
    return [p for p in quantised if p in linear or any(is_inside(p, block) for block in whole)]


def into_dense(base: Any, trees: list[AdapterTree], dtype: torch.dtype | None = None) -> None:
    """Replace every quantised module of `base` by a dense one, and merge checked `trees` on the way.

    Args:
        dtype: of the dense weights; by default the type that each had before it was quantised.

    Raises:
        UsageError: a merged value is not finite; the base is then unchanged.
    """
    views, usual = list(quantised_views(base)), _usual(base)
    paths = {path for path, _ in views}
    replaced: list[tuple[str, nn.Module]] = []
    try:
        for path, view in views:
            base.set_submodule(path, dense_module(view, torch.float32))
            replaced.append((path, view.module))
            into_weights(base, [Part(tree, {path}, inside=True) for tree in trees], keep=False)
            _round(base.get_submodule(path), path, dtype or view.stored_dtype() or usual)
        into_weights(base, [Part(tree, paths, inside=False) for tree in trees], keep=False)
    except Exception:
        for path, module in replaced:
            base.set_submodule(path, module)
        raise
    restore_dtypes(base)
    drop_quantised_marks(base)


def _round(module: nn.Module, path: str, dtype: torch.dtype) -> None:
    for name, parameter in module.named_parameters():
        rounded = parameter.data.to(dtype)
        check_finite(f"{path}.{name}", rounded, parameter.data)
        parameter.data = rounded


def _usual(base: Any) -> torch.dtype:
    """The type that the base was loaded in, where the stored form does not say it."""
    before: torch.dtype | None = next(iter(base.__dict__.get(WIDENED, {}).values()), None)
    return before or usual_dtype(base)
