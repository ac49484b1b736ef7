"""Prepares a call's inputs for the base: inserts virtual tokens and keeps the texts of a packed row apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import packed_row, virtual_tokens
from .frame import Frame, Segments
from .virtual_tokens import InputSpec


def prepare(base: Any, spec: InputSpec, frame: Frame, inputs: dict[str, Any], task_ids: Tensor | None = None) -> dict[str, Any]:
    """Keyword arguments of the base's forward, with the frame's virtual tokens in front of each row.

    Must be called inside the frame, because adapters on the embeddings apply to what is embedded here.

    Args:
        inputs: keyword arguments of the handle's forward; not changed.
        task_ids: `(rows,)`, for adapters whose virtual tokens depend on the task.
    """
    if all(prompt.in_cache for prompt, _ in frame.prompts):
        return inputs
    mixture = frame.mixture
    counts = [virtual_tokens.virtual_counts(part) for part in (mixture.frames if mixture else [frame])]
    real = mixture.real(counts, mixture.size) if mixture else None
    if virtual_tokens.is_continuation(inputs):
        return virtual_tokens.continued(inputs, max(counts), spec, real)
    if mixture is None:
        virtual = virtual_tokens.virtual_tokens(frame, task_ids)
    else:
        virtual = virtual_tokens.virtual_tokens_by_rows(mixture, task_ids)
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


def for_generate(
    base: Any, spec: InputSpec, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any], task_ids: Tensor | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the base's `generate`, with the frame's virtual tokens in front of each prompt."""
    if all(prompt.in_cache for prompt, _ in frame.prompts):
        return args, kwargs
    if args:
        kwargs["input_ids"], *rest = args
        args = (None, *rest)
    ids = kwargs.pop("input_ids", kwargs.pop("inputs", None))
    kwargs = virtual_tokens.generation_inputs(base, ids, kwargs)
    named = ("attention_mask", "inputs_embeds", "token_type_ids")
    given = {"input_ids": ids, **{name: kwargs.pop(name) for name in named if kwargs.get(name) is not None}}
    inputs = prepare(base, spec, frame, {name: value for name, value in given.items() if value is not None}, task_ids)
    inputs.pop("position_ids", None)  # generate counts them from the mask itself
    if ids is not None and not spec.encoder_decoder:
        inputs["input_ids"] = ids  # for the result and for processors that look at the text so far
    return args, {**kwargs, **inputs}
