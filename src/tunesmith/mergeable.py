"""A handle's relation to its base: taking it up, merging adapters into it, leaving it as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import site
from .attach import AdapterTree
from .bases import architecture, quantised
from .conflicts import conflict
from .errors import UsageError
from .frame import CarriesFrame
from .merge import Originals, check, check_order, into_weights, plain_copy, restore
from .merge_quantised import changed, into_dense
from .record import BaseRecord, records


class Mergeable:
    """The part of a `PeftModel` that changes its base, and puts it back."""

    _active: tuple[str, ...]

    def merge_adapter(
        self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False, *, requantize: bool = False
    ) -> None:
        """Put adapters (by default the active ones) into the base's weights, until `unmerge_adapter()`.

        Args:
            requantize: merge into quantised weights, too, which rounds the merged ones again.

        Raises:
            UsageError: adapters are switched off, other handles use this base, the adapter cannot be merged, or its modules
                are quantised and `requantize` is not asked for.
        """
        if self._disabled:
            raise UsageError("adapters are switched off, so none is to act from the weights; call enable_adapters() first")
        names = [name for name in self._named(adapter_names or self._active) if name not in self._merged]
        self._check_mergeable(names, after=tuple(self._merged))
        rounded = [] if requantize else changed(self.base_model, [self.tree(name) for name in names])
        if rounded:
            raise UsageError(
                f"{len(rounded)} of the adapted modules are quantised ({rounded[0]}, ...), and merging would round them again; "
                "merge_and_unload() gives a dense model, merge_adapter(requantize=True) accepts the rounding"
            )
        done: dict[str, Originals] = {}
        try:
            for name in names:
                done[name] = into_weights(self.base_model, [self.tree(name)], safe_merge, keep=True)
        except Exception:
            for originals in reversed(done.values()):
                restore(self.base_model, originals)
            raise
        self._merged.update(done)
        self._settle()

    def unmerge_adapter(self: Any) -> None:
        """Put back the very tensors that merging replaced."""
        for name in reversed(list(self._merged)):
            restore(self.base_model, self._merged.pop(name))
        self._settle()

    def merge_and_unload(
        self: Any,
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
            safe_merge: check that every merged weight is finite.
            adapter_names: which ones; by default the active ones.
            copy: merge into a copy and leave the base and this handle alone.
            dtype: of weights that were quantised; by default the type that they had before.
            requantize: leave a quantised base quantised, which rounds the merged weights again.

        Raises:
            UsageError: other handles use this base and no copy is asked for, or an adapter cannot be merged.
        """
        names = list(self._named(adapter_names or self._active))
        self._check_mergeable(names, alone=not copy)
        trees = [self.tree(name) for name in names]
        if copy:
            with self.disable_adapter():  # out of the weights, while they are copied
                base = plain_copy(self.base_model)
            quantised.release(base)
            _into(base, trees, safe_merge, dtype, requantize)
            self._record.thaw(base)
            return base
        self.unmerge_adapter()
        _into(self.base_model, trees, safe_merge, dtype, requantize)
        return self._detach()

    def unload(self: Any) -> nn.Module:
        """The base as it was before: our sites removed, `requires_grad` restored (unless other handles use it)."""
        self.unmerge_adapter()
        return self._detach()

    def _check_mergeable(self: Any, names: list[str], alone: bool = True, after: tuple[str, ...] = ()) -> None:
        others = [handle for handle in self._record.handles if handle is not self]
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
            raise UsageError(f"not a change of weights, so it cannot be merged: {', '.join(fixed)}; use the handle as it is")
        for name in names:
            check(self.base_model, self.tree(name))
        together = {name: self.tree(name) for name in (*after, *names)}
        reason = conflict(together)
        if reason:
            raise UsageError(reason)
        check_order(self.base_model, together)

    def _register(self: Any) -> None:
        base = self.base_model
        if base not in records:
            records[base] = BaseRecord({name: p.requires_grad for name, p in base.named_parameters()})
        self._record = records[base]
        self._record.handles.add(self)
        self._take_up_stored()
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    def _take_up_stored(self: Any) -> None:
        """Quantised modules compute through their views, so that nothing rewrites what they store."""
        quantised.hold(self.base_model)
        for _, view in quantised.quantised_views(self.base_model):
            if site.fault(view.module) is None:
                site.install(view.module)

    def _detach(self: Any) -> nn.Module:
        base, record = self.base_model, self._record
        record.handles.discard(self)
        self._active = ()
        self._settle()
        if not record.handles:
            for module in base.modules():
                site.remove(module)
                function = architecture.recomputing_function(module)
                if isinstance(function, CarriesFrame):
                    architecture.set_recomputing_function(module, function.checkpoint)
            quantised.release(base)
            record.thaw(base)
            records.pop(base, None)
        return base


def _into(base: nn.Module, trees: list[AdapterTree], safe: bool, dtype: torch.dtype | None, requantize: bool) -> None:
    if requantize or not any(quantised.quantised_views(base)):
        into_weights(base, trees, safe, keep=False)
    else:
        into_dense(base, trees, safe, dtype)
