"""Mixed batches: each row of a call runs with its own adapters, at every module, in one pass of the base.

A module's input is split into groups of rows that share their adapters, each group goes through the module with these
adapters, and the results are put back in row order. This is the reference definition for every kind of adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, SublayerAdapter
from ..bases.view import plain_forward, view_type
from ..errors import UsageError
from .cache import is_cache
from .fold import fold
from .frame import Around, Mixture, entered

Groups = list[tuple[tuple[Adapter, ...], Tensor]]  # adapters, and the indices of the rows they act on


def run_by_rows(
    module: nn.Module, mixture: Mixture, adapters: list[tuple[Any, ...]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The module's output for a mixed batch.

    Args:
        adapters: for each part of the mixture, the adapters at this module.

    Raises:
        UsageError: the module's input cannot be split by rows.
    """
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if x is None or x.dim() == 0 or (x.shape[0] != 1 and x.shape[0] % mixture.size):
        shape = "no tensor" if x is None else tuple(x.shape)
        raise UsageError(f"a {type(module).__name__} received {shape}, which cannot be split into {mixture.size} rows")
    if not getattr(module, "batch_first", True):
        raise UsageError(
            f"this {type(module).__name__} takes rows in its second dimension (batch_first=False); run one adapter at a time"
        )
    around = [next((one for one in group if isinstance(one, Around)), None) for group in adapters]
    first = next((one for one in around if one is not None), None)
    if first is not None:
        rest = [tuple(one for one in group if not isinstance(one, Around)) for group in adapters]

        def call(*args: Any, **kwargs: Any) -> Any:
            if not any(rest):
                return plain_forward(module)(*args, **kwargs)
            return run_by_rows(module, mixture, rest, args, kwargs)

        return first.by_rows(around, mixture, call, *args, **kwargs)
    if view_type(module) is None and all(isinstance(adapter, SublayerAdapter) for group in adapters for adapter in group):
        return _change_by_rows(module, mixture, adapters, args, kwargs)
    if any(is_cache(value) for value in (*args, *kwargs.values())):
        raise UsageError(
            f"a {type(module).__name__} keeps one cache for all rows, so a private copy of it cannot run for some of them"
        )
    groups, inverse = mixture.rows(x.shape[0])
    results = []
    for frame, effective, rows in zip(mixture.frames, adapters, groups):
        share = _share(x, rows)
        with entered(frame):  # for modules inside this one, which see only these rows
            selected = {name: share(value) for name, value in kwargs.items()}
            results.append(fold(module, effective)(*map(share, args), **selected))
    return _joined(results, groups, inverse)


def _change_by_rows(
    module: nn.Module, mixture: Mixture, adapters: list[tuple[Adapter, ...]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Likewise for a block, which runs once for all rows (it may keep a cache); its adapters change the result by rows."""
    result = plain_forward(module)(*args, **kwargs)
    hidden = result if isinstance(result, Tensor) else result[0]
    groups, inverse = mixture.rows(hidden.shape[0])
    changed = []
    for frame, effective, rows in zip(mixture.frames, adapters, groups):
        share = _share(hidden, rows)
        part, own_args = hidden[rows], tuple(map(share, args))
        own_kwargs = {name: share(value) for name, value in kwargs.items()}
        with entered(frame):  # for modules that an adapter calls
            for adapter in effective:
                part = adapter(part, module, own_args, own_kwargs)
        changed.append(part)
    joined = _joined(changed, groups, inverse)
    return joined if isinstance(result, Tensor) else (joined, *result[1:])


def _share(like: Tensor, rows: Tensor) -> Callable[[Any], Any]:
    """A function that selects these rows of a tensor with the same rows as `like`, and leaves other values alone.

    A floating-point matrix next to a larger input is a table over positions, whatever its first dimension.
    """

    def share(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(share, value))
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != like.shape[0] or like.shape[0] == 1:
            return value
        is_table = value.dim() < 3 and value.dim() < like.dim() and value.is_floating_point()
        return value if is_table or value.dim() == 1 < like.dim() else value[rows]

    return share


def _joined(results: list[Any], groups: list[Tensor], inverse: Tensor) -> Any:
    """The groups' results in batch order; a single row shared by a group is repeated."""
    if isinstance(results[0], Tensor):
        whole = [r.expand(len(rows), *r.shape[1:]) if len(r) == 1 else r for r, rows in zip(results, groups)]
        return torch.cat(whole)[inverse]
    if isinstance(results[0], (tuple, list)):
        return type(results[0])(_joined(list(parts), groups, inverse) for parts in zip(*results))
    return results[0]
