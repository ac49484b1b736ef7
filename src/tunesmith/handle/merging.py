"""A handle and its base: joining it, merging adapters into it, leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from ..attach.conflicts import conflict
from ..attach.tree import AdapterTree
from ..bases import quantised
from ..bases.precision import convert, usual_dtype
from ..errors import UsageError
from ..merge.dense import changed, into_dense
from ..merge.weights import Originals, check, check_order, into_weights, plain_copy, restore
from ..runtime import site
from .shared_base import SharedBase, join, leave
from .switching import Switching


class Merging(Switching):
    """The part of a handle that changes its base, and restores it.

    Attributes:
        _shared_base: what this handle shares with others of its base.
    """

    _shared_base: SharedBase

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, *, requantize: bool = False
    ) -> None:
        """Merge adapters (by default the active ones) into the base's weights, until `unmerge_adapter()`.

        Args:
            safe_merge: for the ecosystem's scripts; every merged weight is checked to be finite, whatever it says.
            requantize: also merge into quantised weights, which rounds the merged ones again.

        Raises:
            UsageError: adapters are switched off, other handles use this base, the adapter cannot be merged, its modules are
                quantised and `requantize` is not set, or merged values are not finite in their type.
        """
        if self._disabled:
            raise UsageError("adapters are disabled, and merging would put them into effect; call enable_adapters() first")
        names = [name for name in self._named(adapter_names or self._active) if name not in self.merged_adapters]
        self._check_mergeable(names, after=tuple(self.merged_adapters))
        rounded = [] if requantize else changed(self.bare_base, [self.tree(name) for name in names])
        if rounded:
            raise UsageError(
                f"{len(rounded)} of the adapted modules are quantised ({rounded[0]}, ...), and merging would round them again; "
                "merge_and_unload() gives a dense model, merge_adapter(requantize=True) accepts the rounding"
            )
        done: dict[str, Originals] = {}
        try:
            for name in names:
                done[name] = into_weights(self.bare_base, [self.tree(name)], keep=True)
        except Exception:
            for originals in reversed(done.values()):
                restore(self.bare_base, originals)
            raise
        self.merged_adapters.update(done)
        self._settle()

    def unmerge_adapter(self) -> None:
        """Put back the tensors that merging replaced, bit for bit."""
        for name in reversed(list(self.merged_adapters)):
            restore(self.bare_base, self.merged_adapters.pop(name))
        self._settle()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        copy: bool = False,
        *,
        dtype: torch.dtype | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """The base with the adapters in its weights: a plain model again. A quantised base gives a dense one.

        Args:
            safe_merge: for the ecosystem's scripts; every merged weight is checked to be finite, whatever it says.
            adapter_names: which ones; by default the active ones.
            copy: merge into a copy and leave the base and this handle unchanged.
            dtype: of the model that results; of a quantised base, of the weights that were quantised. By default nothing
                changes its type, and quantised weights get their original one.
            requantize: leave a quantised base quantised, which rounds the merged weights again.

        Raises:
            UsageError: other handles use this base and `copy` is not set, an adapter cannot be merged, or merged values are
                not finite in their type (float16 holds up to 65,504).
        """
        names = list(self._named(adapter_names or self._active))
        self._check_mergeable(names, alone=not copy)
        trees = [self.tree(name) for name in names]
        if copy:
            with self.disable_adapter():  # unmerged while the weights are copied
                base = plain_copy(self.bare_base)
            quantised.release(base)
            _into(base, trees, dtype, requantize)
            self._shared_base.thaw(base)
            return base
        self.unmerge_adapter()
        _into(self.bare_base, trees, dtype, requantize)
        return self._leave_base()

    def unload(self) -> nn.Module:
        """The base as it was before: our sites removed, `requires_grad` restored (unless other handles use it)."""
        self.unmerge_adapter()
        return self._leave_base()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the handle computes exactly what its base does."""
        before, merged = self._disabled, list(self.merged_adapters)
        self.disable_adapters()
        try:
            yield
        finally:
            self._disabled = before
            self._settle()
            if merged:
                self.merge_adapter([name for name in merged if name in self.peft_config], requantize=True)

    def disable_adapters(self) -> None:
        """As `disable_adapter()`, until `enable_adapters()`."""
        self.unmerge_adapter()
        self._disabled = True
        self._settle()

    def enable_adapters(self) -> None:
        self._disabled = False
        self._settle()

    disable_adapter_layers = disable_adapters  # the ecosystem's older names
    enable_adapter_layers = enable_adapters

    def _check_mergeable(self, names: list[str], alone: bool = True, after: tuple[str, ...] = ()) -> None:
        others = [handle for handle in self._shared_base.handles if handle is not self]
        if alone and others:
            raise UsageError(
                f"{len(others)} other handle(s) use this base, whose weights merging would change under them; "
                "call merge_and_unload(copy=True), or delete or unload the others first"
            )
        fixed = [
            f"{name} ({type(adapter).__name__})"
            for name in names
            for adapter in self.tree(name).modules()
            if getattr(adapter, "mergeable", True) is False
        ]
        if fixed:
            raise UsageError(f"not weight changes, so they cannot be merged: {', '.join(fixed)}; use the handle unmerged")
        for name in names:
            check(self.bare_base, self.tree(name))
        together = {name: self.tree(name) for name in (*after, *names)}
        reason = conflict(together)
        if reason:
            raise UsageError(reason)
        check_order(self.bare_base, together)

    def _join_base(self) -> None:
        """Join the base's handles, and freeze its parameters."""
        self._shared_base = join(self)
        self._hold_stored()
        for parameter in self.bare_base.parameters():
            parameter.requires_grad_(False)

    def _hold_stored(self) -> None:
        """Quantised modules compute through their views, so that nothing rewrites what they store."""
        quantised.hold(self.bare_base)
        for _, view in quantised.quantised_views(self.bare_base):
            if site.fault(view.module) is None:
                site.install(view.module)

    def _leave_base(self) -> nn.Module:
        """Leave the base; the last handle to do so removes everything that was installed on it."""
        base = self.bare_base
        self._active = ()
        self._settle()
        if leave(self, self._shared_base):
            for module in base.modules():
                site.remove(module)
            quantised.release(base)
            self._shared_base.thaw(base)
        return cast(nn.Module, base)


def _into(base: nn.Module, trees: list[AdapterTree], dtype: torch.dtype | None, requantize: bool) -> None:
    stored = any(quantised.quantised_views(base))
    if stored and not requantize:
        into_dense(base, trees, dtype)
    elif stored and dtype is not None:
        raise UsageError("requantize=True keeps the stored form, which has no dtype; leave one of the two out")
    elif dtype is None:
        into_weights(base, trees, keep=False)
    else:
        types = {usual_dtype(base): dtype}
        into_weights(base, trees, keep=False, types=types)
        convert(base, types)
