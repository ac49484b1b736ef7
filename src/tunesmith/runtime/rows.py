"""Masks and positions of rows that get virtual tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UsageError


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """The tokens of a call, as ids `(rows, tokens)` or as embeddings `(rows, tokens, dim)`."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is None and embeds is None:
        raise UsageError("virtual tokens need input_ids or inputs_embeds to come before, but the call has neither")
    return cast(Tensor, embeds if ids is None else ids)


def embedded(inputs: dict[str, Any], embed: nn.Module) -> Tensor:
    """The embeddings of a call, `(rows, tokens, dim)`; removes `input_ids` from the inputs."""
    ids, embeds = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
    found: Tensor = embed(ids) if embeds is None else embeds
    return found


def prepend(values: Tensor, n: int, fill: int | Tensor) -> Tensor:
    """`values` `(B, T)` with n columns in front of them, filled with one value or with given ones, `(B, n)`."""
    first = fill.to(values.dtype) if isinstance(fill, Tensor) else values.new_full((values.shape[0], n), fill)
    return torch.cat([first, values], dim=1)


def counts(n: int, real: Tensor | None) -> int | Tensor:
    """Number of virtual tokens of each row: an int, or `(B, 1)`."""
    return n if real is None else real.sum(1, keepdim=True)


def counted_positions(mask: Tensor) -> Tensor:
    """Positions of the unmasked tokens, counted from 0 in each row."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def shifted_positions(positions: Tensor, n: int, real: Tensor | None) -> Tensor:
    """The user's positions `(..., B, T)`, shifted by the row's virtual tokens, with the positions of those in front."""
    if real is None:
        first = torch.arange(n, device=positions.device, dtype=positions.dtype)
    else:
        positions = positions.expand(*positions.shape[:-2], real.shape[0], -1)
        first = counted_positions(real).to(positions.dtype)
    return torch.cat([first.expand(*positions.shape[:-1], -1), positions + counts(n, real)], dim=-1)
