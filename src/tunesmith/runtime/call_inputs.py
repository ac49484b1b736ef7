"""Prepares a call's inputs for the base: inserts virtual tokens and keeps the texts of a packed row apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..bases import architecture
from . import cache, packed_row, virtual_tokens
from .frame import Frame, Segments
from .rows import tokens_of
from .virtual_tokens import InputSpec


def prepare(base: Any, spec: InputSpec, frame: Frame, inputs: dict[str, Any], task_ids: Tensor | None = None) -> dict[str, Any]:
    """Keyword arguments of the base's forward, with the frame's virtual tokens in front of each row.

    Must be called inside the frame, because adapters on the embeddings apply to what is embedded here.

    Args:
        inputs: keyword arguments of the handle's forward; not changed.
        task_ids: `(rows,)`, for adapters whose virtual tokens depend on the task.
    """
    mixture, parts = frame.mixture, frame.mixture.frames if frame.mixture else [frame]
    counts, prefixes = ([virtual_tokens.virtual_counts(part, held) for part in parts] for held in (False, True))
    begun = virtual_tokens.is_continuation(inputs)
    if spec.image_positions and inputs.get("position_ids") is None:
        seen = cache.length(cache.given(inputs)) - max(counts) - max(prefixes) if begun else 0
        inputs = {**inputs, "position_ids": architecture.image_positions(base, inputs, seen)}
    if not any(counts):
        return inputs
    inputs = {name: value for name, value in inputs.items() if name != "cache_position"}  # the base reads them off the cache
    rows = tokens_of(inputs).shape[0]
    real = mixture.real(counts, rows) if mixture else None
    if begun:
        return virtual_tokens.continued(inputs, max(counts), spec, real, max(prefixes))
    if mixture is None:
        virtual = virtual_tokens.virtual_tokens(frame, task_ids)
    else:
        virtual = virtual_tokens.virtual_tokens_by_rows(mixture, task_ids, rows)
    return virtual_tokens.extend(inputs, virtual, base.get_input_embeddings(), spec, real)


def pack(
    base: Any, spec: InputSpec, frame: Frame, inputs: dict[str, Any], task_ids: Tensor | None = None, multiple_of: int = 1
) -> tuple[Frame, dict[str, Any]]:
    """The frame of a packed call, and the base's keyword arguments, with virtual tokens in front of each text.

    Args:
        inputs: keyword arguments of the handle's forward, boundaries of texts among them; not changed.
        task_ids: `(texts,)`.
        multiple_of: the row is padded to a multiple of this length with one more text, which has no labels.
    """
    virtual = None
    if frame.mixture is None and virtual_tokens.virtual_counts(frame):
        virtual = virtual_tokens.virtual_tokens(frame, task_ids)
        virtual_tokens.check_length(Segments.of(inputs).longest, virtual.shape[-2], spec)
    return packed_row.packed(base, frame, inputs, virtual, multiple_of)
