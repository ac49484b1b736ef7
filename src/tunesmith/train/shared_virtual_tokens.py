"""Virtual tokens that are the same in front of every text, computed once for the batch.

Under causal attention nothing behind them changes what virtual tokens compute, so they run as one row; the texts of the
batch, in rows or packed into one, then run behind their keys and values, whose gradients autograd sums over the texts. This
takes `texts - 1` times the number of virtual tokens less work than running them in front of each, and one more pass over the
weights, which is as much as a few dozen tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bases import architecture
from ..errors import UsageError
from ..model import PeftModel
from ..runtime import cache, packed_row
from ..runtime.frame import BOUNDARIES, Frame, Segments
from ..runtime.rows import prepend
from ..runtime.virtual_tokens import check_length, virtual_counts, virtual_tokens
from . import known_loss

UNUSUAL = {"inputs_embeds", *cache.NAMES, "token_type_ids", "task_ids"}

PASS = 32  # tokens that cost as much as reading all weights once more
WORTH = 64  # tokens that must be saved beyond that


def applies(handle: PeftModel, frame: Frame, inputs: dict[str, Any]) -> bool:
    """Whether a training batch is of several texts that all begin with the same virtual tokens."""
    spec, mask, boundaries = handle.input_spec, inputs.get("attention_mask"), inputs.get(BOUNDARIES)
    base = handle.bare_base
    texts = len(inputs["input_ids"]) if boundaries is None else len(boundaries) - 1
    return (
        len(frame.prompts) == 1
        and virtual_counts(frame) > 0
        and not frame.adapters
        and type(base).__name__ in known_loss.CAUSAL
        and not architecture.is_bidirectional(base.config)
        and not architecture.rope_depends_on_length(base.config)
        and not architecture.has_cross_attention(base.config)
        and not frame.prompts[0][0].by_task
        and spec.labels_per_token
        and cache.cache_name(base) is not None
        and not UNUSUAL & inputs.keys()
        and (boundaries is not None or "position_ids" not in inputs)
        and _saved(texts, virtual_counts(frame)) >= WORTH
        and not handle.recomputes()
        and (mask is None or (mask.dim() == 2 and bool(mask[:, 0].all())))
    )


def _saved(texts: int, virtual: int) -> int:
    return texts * virtual - max(virtual, PASS)


def run(handle: PeftModel, frame: Frame, inputs: dict[str, Any], tap: Any, multiple_of: int) -> Tensor:
    """The base's run on a batch.

    Args:
        inputs: of `(B, T)` tokens, without labels; padded at the right, or packed.
        tap: holds the hidden states of each call of the output head as `hidden`.
        multiple_of: the length of a packed row is made a multiple of it.

    Returns:
        Hidden states before the output head that predict each token, `(B, T, dim)`: the first one's is the last virtual
        token's.

    Raises:
        UsageError: the base has too few positions, or keeps no keys and values.
    """
    base, packed = handle.bare_base, inputs.get(BOUNDARIES) is not None
    rows, length = inputs["input_ids"].shape
    with handle.entered(frame):
        virtual = virtual_tokens(frame, None)  # (n, dim)
    check_length(Segments.of(inputs).longest if packed else length, len(virtual), handle.input_spec)
    kept = _run_virtual(handle, frame, virtual, inputs.get(BOUNDARIES))
    last = tap.hidden[:, -1:]  # (1, 1, dim)
    if not cache.expand(kept, rows):
        raise UsageError(f"{type(base).__name__} does not cache the keys and values of every layer")
    before = torch.arange(length, device=last.device)  # of each token, where the one before it is behind `last`
    if packed:
        before[inputs[BOUNDARIES][:-1].long()] = 0
        frame, inputs = packed_row.packed(base, frame, inputs, multiple_of=multiple_of)
        inputs["position_ids"] = inputs["position_ids"] + len(virtual)
    elif inputs.get("attention_mask") is not None:
        inputs = {**inputs, "attention_mask": prepend(inputs["attention_mask"], len(virtual), 1)}
    with handle.entered(frame):
        base(**cache.with_cache({**inputs, "use_cache": True}, cache.cache_name(base) or "", kept))
    hidden = torch.cat([last.expand(rows, -1, -1), tap.hidden], dim=1)
    return hidden[:, before] if packed else hidden[:, :-1]


def _run_virtual(handle: PeftModel, frame: Frame, virtual: Tensor, boundaries: Tensor | None) -> Any:
    """Run virtual tokens as one row, packed if the texts behind them are; returns a cache of their keys and values."""
    base, kept = handle.bare_base, cache.empty(handle.bare_base.config)
    inputs: dict[str, Any] = {"inputs_embeds": virtual[None].to(base.get_input_embeddings().weight.dtype)}
    if boundaries is not None:
        alone = {**inputs, BOUNDARIES: boundaries.new_tensor([0, len(virtual)])}
        frame, inputs = packed_row.packed(base, frame, alone)
    with handle.entered(frame):
        base(**cache.with_cache({**inputs, "use_cache": True}, cache.cache_name(base) or "", kept))
    return kept
