"""Attention within each text of a packed row, as transformers calls attentions.

For each text s, with its own queries, keys and values:

    Y_s = softmax(Q_s K_s^T / sqrt(d) + causal mask) V_s

so no padding is computed, and no mask over the whole row is needed. If K and V hold more tokens than the row has (a prefix
in the cache), every token of every text attends to the first ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bases.architecture import register_attention
from ..kernels import short_attention
from .frame import Segments, current_frame

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # older torch
    varlen_attn = None

ATTENTION = "tunesmith_packed"  # its name in transformers' table of attentions


class Scores(NamedTuple):
    """What is done to scores besides the softmax; `attend` explains the fields."""

    dropout: float
    scaling: float | None
    window: int | None
    softcap: float | None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each text of a packed row, under the signature of transformers' attentions.

    Args:
        query: `(1, heads, T, head_dim)`; key and value may have fewer heads, and more tokens: all texts attend to the
            extra ones, which come first.
        sliding_window: how many tokens a token attends to, itself included.
        softcap: scores are capped at this size by `c tanh(score / c)`.

    Returns:
        `(1, T, heads, head_dim)`, and no weights.
    """
    frame = current_frame()
    assert frame is not None and frame.segments is not None, "this attention is used only in a packed call's own config"
    segments = frame.segments
    if not dropout and softcap is None and sliding_window is None and _has_kernel(query):
        return _attend_at_once(query, key, value, segments, scaling), None
    queries = torch.split(query, segments.lengths, dim=2)
    keys, values = (_seen_by_texts(tensor, segments) for tensor in (key, value))
    how = Scores(dropout, scaling, sliding_window, softcap)
    texts = [_attend_one(q, k, v, how) for q, k, v in zip(queries, keys, values)]
    return torch.cat([text.transpose(1, 2) for text in texts], dim=1), None


register_attention(ATTENTION, attend)


def _seen_by_texts(tensor: Tensor, segments: Segments) -> list[Tensor]:
    """The keys or values that each text attends to: the shared ones in front, then its own."""
    first, *texts = torch.split(tensor, [tensor.shape[2] - sum(segments.lengths), *segments.lengths], dim=2)
    return [torch.cat([first, text], dim=2) for text in texts] if first.shape[2] else texts


def _attend_one(query: Tensor, key: Tensor, value: Tensor, how: Scores) -> Tensor:
    """One text's causal attention, `(1, heads, length, head_dim)`."""
    length, seen = query.shape[2], key.shape[2]
    if how.softcap is not None:
        return _attend_capped(query, key, value, how, how.softcap)
    windowed = how.window is not None and how.window < seen
    if not windowed and not how.dropout and short_attention.applies(query, key, value):
        return short_attention.short_attention(query, key, value, how.scaling)
    mask = _seen(length, seen, how.window, query.device) if windowed or length < seen else None
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, how.dropout, is_causal=mask is None, scale=how.scaling, enable_gqa=grouped
    )


def _attend_capped(query: Tensor, key: Tensor, value: Tensor, how: Scores, cap: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if how.scaling is None else how.scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / cap) * cap  # (1, heads, length, seen)
    scores = scores.masked_fill(~_seen(query.shape[2], key.shape[2], how.window, query.device), -torch.inf)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, how.dropout) @ value


def _seen(length: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """`(length, keys)`: whether the token of a row attends to that of a column; the last `length` columns are its text."""
    before = keys - length
    seen = torch.ones(length, keys, dtype=torch.bool, device=device).tril(before)
    return seen if window is None else seen.triu(before + 1 - window)


def _has_kernel(query: Tensor) -> bool:
    """Whether flash attention supports these queries: 16 bits on Ampere or later."""
    fits = query.is_cuda and query.dtype.itemsize == 2 and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return fits and varlen_attn is not None and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _attend_at_once(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """All texts in one kernel, `(1, T, heads, head_dim)`; its causal mask is aligned to the ends of queries and keys."""
    boundaries, longest, before = segments.boundaries, segments.longest, key.shape[2] - query.shape[2]
    key_boundaries = boundaries
    if before:
        key, value = (torch.cat(_seen_by_texts(tensor, segments), dim=2) for tensor in (key, value))
        key_boundaries = boundaries + before * torch.arange(len(boundaries), dtype=torch.int32, device=boundaries.device)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, head_dim)
    grouped = key.shape[1] != query.shape[1]
    result: Tensor = varlen_attn(
        query,
        key,
        value,
        boundaries,
        key_boundaries,
        longest,
        longest + before,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=grouped,
    )
    return result[None]
