"""Memory and work of a dry run: operations on meta tensors are counted and not computed.

Weights are meta tensors: they have shapes and no values. Token ids, masks and labels are real, so that whatever depends on
their values (which positions have labels, where texts end) is decided as in the real run. An operation on real tensors alone
is computed; one that involves a meta tensor gives a meta tensor.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
functional: Any = torch.nn.functional
ASKED = (aten._local_scalar_dense.default, aten.equal.default)  # a program reads a tensor's value
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
OF_ITS_OWN = 32 * 2**20  # bytes from which glibc returns memory at once (M_MMAP_THRESHOLD at its highest)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts what tensors hold and what operations do.

    Attributes:
        slack: what a heap loses in gaps between blocks, as a share of the blocks in it; large blocks are outside it.
        live: bytes held now.
        peaks: the most that were held in each phase, slack included.
        flops: multiplications and additions of matrix products and attention.
        moved: bytes that all other operations wrote.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.flops = self.moved = 0
        self.slack = 0.0
        self.peaks: Counter[str] = Counter()
        self._in_gaps = 0.0
        self._phase = ""
        self._known: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> Ledger:
        self._attention = _fused_attention()
        self._attention.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._attention.__exit__(*error)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside is counted under this name in `peaks`."""
        before, self._phase = self._phase, name
        self.peaks[name] = max(self.peaks[name], self.live)
        try:
            yield
        finally:
            self._phase = before

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that already exist and lie without gaps; returns their bytes."""
        slack, self.slack = self.slack, 0.0
        held = sum(map(self._note, tensors))
        self.slack = slack
        return held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            if func in ASKED:
                return True
            if func in INDEXED:  # how much is chosen depends on the indices, which stay real
                args = (_on_meta(args[0]), args[1], *_on_meta(args[2:]))
            elif not all(tensor.is_meta for tensor in tensors):
                args, kwargs = _on_meta((args, kwargs))
        result = func(*args, **kwargs)
        made = sum(self._note(tensor) for tensor in tree_flatten(result)[0] if isinstance(tensor, Tensor))
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            self.moved += made
        else:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result

    def _note(self, tensor: Tensor) -> int:
        """Bytes of a tensor whose memory is new."""
        storage = tensor.untyped_storage()
        key, known = id(storage), self._known.get(id(storage))
        if known is not None and known() is storage:
            return 0
        size = storage.nbytes()
        gaps = self.slack * size if size < OF_ITS_OWN else 0.0

        def forget(_: Any) -> None:
            self.live -= size
            self._in_gaps -= gaps
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self._in_gaps += gaps
        self.peaks[self._phase] = max(self.peaks[self._phase], self.live + int(self._in_gaps))
        return size


def _on_meta(values: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), values)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Inside, attention of meta tensors is one fused operation, as on CPUs and GPUs; torch would decompose it.

    A `TorchFunctionMode` would not do: it is not active while a backward pass recomputes a layer.
    """
    plain = functional.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        decomposed = not query.is_meta or (attn_mask is not None and attn_mask.requires_grad)  # no kernel gives it a gradient
        chosen = plain if decomposed else _attention
        result: Tensor = chosen(query, key, value, attn_mask, *args, **kwargs)
        return result

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # kernels add masks to scores
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype, device="meta")
    fused: Any = aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result
