"""Virtual tokens that are the same in front of every row, computed once for the batch.

Under causal attention nothing behind them changes what virtual tokens compute, so they run as one row; the rows of the
batch then run behind their keys and values, which are broadcast, and whose gradients autograd sums over the rows. This
takes `rows - 1` times the number of virtual tokens less work than running them in front of each row, and one more pass over the
weights, which is as much as a few dozen tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .. import segments
from ..errors import UsageError
from ..frame import Frame
from ..model import PeftModel
from ..prompting import prepend, virtual_counts, virtual_tokens

UNUSUAL = {"inputs_embeds", "past_key_values", "position_ids", "token_type_ids", "task_ids", segments.BOUNDARIES}

PASS = 32  # tokens that cost as much as reading all weights once more
WORTH = 64  # tokens that must be saved beyond that


def applies(handle: PeftModel, frame: Frame, inputs: dict[str, Any]) -> bool:
    """Whether a training batch is of several rows that all begin with the same virtual tokens, then text."""
    entrance, mask = handle._entrance, inputs.get("attention_mask")
    return (
        len(frame.prompts) == 1
        and virtual_counts(frame) > 0
        and not frame.prompts[0][0].by_task
        and entrance.labels_per_token
        and "past_key_values" in entrance.accepts
        and not UNUSUAL & inputs.keys()
        and _saved(len(inputs["input_ids"]), virtual_counts(frame)) >= WORTH
        and not any(module.gradient_checkpointing for module in handle._checkpointing)
        and (mask is None or (mask.dim() == 2 and bool(mask[:, 0].all())))
    )


def _saved(rows: int, virtual: int) -> int:
    return rows * virtual - max(virtual, PASS)


def run(base: Any, frame: Frame, inputs: dict[str, Any], tap: Any) -> Tensor:
    """The base's run on a batch, inside its handle's frame.

    Args:
        inputs: of `(B, T)` tokens, without labels; padded at the right.
        tap: holds the hidden states of each call of the output head as `hidden`.

    Returns:
        Hidden states before the output head, `(B, 1 + T, dim)`: the last virtual token's, then the text's.
    """
    embed, rows = base.get_input_embeddings(), len(inputs["input_ids"])
    cache = DynamicCache(config=base.config)
    virtual = virtual_tokens(frame, None)  # (n, dim)
    base(inputs_embeds=virtual[None].to(embed.weight.dtype), past_key_values=cache, use_cache=True)
    last = tap.hidden[:, -1:]  # (1, 1, dim)
    layers: list[Any] = cache.layers
    for layer in layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise UsageError(f"{type(base).__name__} does not keep keys and values of every layer")
        layer.keys, layer.values = layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)
    if inputs.get("attention_mask") is not None:
        inputs = {**inputs, "attention_mask": prepend(inputs["attention_mask"], len(virtual), 1)}
    base(**{**inputs, "past_key_values": cache, "use_cache": True})
    return torch.cat([last.expand(rows, -1, -1), tap.hidden], dim=1)
