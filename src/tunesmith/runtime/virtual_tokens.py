"""Virtual tokens before the model's inputs: how the inputs of a call change, for every kind of model.

Virtual tokens come before a row's first real token, after any left padding: `[pad pad | v v v | x x x]`. Positions
are counted from the mask. A row therefore gives the same result whatever its padding; on rows without left padding this
is exactly `[v v v | x x x | pad pad]`, the form every other system uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import architecture
from ..config import PromptConfig, TaskType
from ..errors import ConfigError, UsageError
from ..labels import IGNORED
from . import cache
from .frame import Frame, Mixture
from .rows import counted_positions, counts, embedded, prepend, shifted_positions, tokens_of


@dataclass(frozen=True)
class InputSpec:
    """What must be known about a base model to put virtual tokens in front of its input.

    Args:
        accepts: names of the forward's parameters.
        encoder_decoder: the tokens go before the encoder's input, and labels are unchanged.
        labels_per_token: there is one label per input token, so each virtual token gets the label `IGNORED`.
        last_token_decides: the head reads the last position (classifiers on causal models), so right padding moves
            to the front, where the model cannot mistake it for the end.
        first_token_decides: the head reads the first position (classifiers on encoders), so padding moves to the end.
        reads_first_token: in addition to its outputs for each token, the model pools the first position.
        positions: size of the learned table of positions; None if positions are computed.
        image_positions: the model counts positions of images along several axes, from ids.
        mask_positions: position ids, counted from the mask, may be given (not to RoBERTa, which counts from the padding id).
    """

    accepts: frozenset[str]
    encoder_decoder: bool
    labels_per_token: bool
    last_token_decides: bool
    first_token_decides: bool
    reads_first_token: bool
    positions: int | None
    image_positions: bool
    mask_positions: bool


def virtual_counts(frame: Frame, in_cache: bool = False) -> int:
    """Number of virtual tokens that the frame puts in front of the input, or of those it puts in the cache."""
    return sum(tokens for prompt, tokens in frame.prompts if prompt.in_cache == in_cache)


def virtual_tokens(frame: Frame, task_ids: Tensor | None) -> Any:
    """The frame's virtual tokens in front of the input, `(n, dim)` or `(rows, n, dim)`; None if it has none."""
    for prompt, tokens in frame.prompts:
        if not prompt.in_cache:
            virtual = prompt(task_ids) if prompt.by_task else prompt()
            return virtual[..., :tokens, :]  # rows for a decoder follow; no method here uses them
    return None


def virtual_tokens_by_rows(mixture: Mixture, task_ids: Tensor | None, length: int) -> Tensor:
    """The virtual tokens in front of each of `length` rows of a mixed batch, `(rows, n, dim)`; `task_ids` has as many."""
    parts = zip(mixture.frames, mixture.rows(length)[0])
    values = [virtual_tokens(frame, None if task_ids is None else task_ids[rows]) for frame, rows in parts]
    return mixture.stacked(values, 2, length)


def extend(
    inputs: dict[str, Any], virtual: Tensor, embed: nn.Module, spec: InputSpec, real: Tensor | None = None
) -> dict[str, Any]:
    """The inputs of a text's first forward call, with virtual tokens inserted (for later calls: `continued`).

    Args:
        inputs: keyword arguments of the base's forward; not changed.
        virtual: `(n, dim)`, or other tokens for each row, `(B, n, dim)`.
        embed: the base's input embeddings.
        real: `(B, n)`, which of the virtual tokens a row has (the others are padding); None if every row has all of them.

    Returns:
        New keyword arguments, with `inputs_embeds` `(B, n + T, dim)` in place of `input_ids`.
    """
    inputs = dict(inputs)
    if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
        raise UsageError("prompt adapters need exactly one of input_ids and inputs_embeds")
    n, embeds = virtual.shape[-2], embedded(inputs, embed)
    rows, length = embeds.shape[:2]
    if virtual.dim() == 3:
        check_tasks(virtual.shape[0], rows)
    mask = inputs.get("attention_mask")
    _check_extension(length, mask, n, spec, real)
    if mask is None and (real is not None or "attention_mask" in spec.accepts):
        inputs["attention_mask"] = torch.ones((rows, length), dtype=torch.long, device=embeds.device)
    order = None if mask is None and real is None else _order(inputs["attention_mask"], n, real, spec)

    embeds = torch.cat([virtual.to(embeds.dtype).expand(rows, -1, -1), embeds], dim=1)
    inputs["inputs_embeds"] = embeds if order is None else embeds.gather(1, order[:, :, None].expand_as(embeds))
    per_token: dict[str, Any] = {"attention_mask": 1 if real is None else real, "token_type_ids": 0, "mm_token_type_ids": 0}
    if spec.labels_per_token:
        per_token["labels"] = IGNORED
    for name, fill in per_token.items():
        if inputs.get(name) is not None:
            values = prepend(inputs[name], n, fill)
            inputs[name] = values if order is None else values.gather(1, order)
    for name in ("start_positions", "end_positions"):  # answer spans are given in the user's tokens, which all move by n
        if inputs.get(name) is not None and not spec.encoder_decoder:
            inputs[name] = inputs[name] + n
    if inputs.get("position_ids") is not None:
        positions = shifted_positions(inputs["position_ids"], n, real)
        if order is not None:
            order = order.expand(*positions.shape[:-2], -1, -1)
            positions = positions.expand(order.shape).gather(-1, order)
        inputs["position_ids"] = positions
    elif order is not None and spec.mask_positions:
        inputs["position_ids"] = counted_positions(inputs["attention_mask"])
    return inputs


def _check_extension(length: int, mask: Tensor | None, n: int, spec: InputSpec, real: Tensor | None) -> None:
    """Reject an input of `length` tokens that the base cannot read after n virtual ones."""
    check_length(length, n, spec)
    if mask is not None and mask.dim() != 2:
        raise UsageError(f"prompt adapters need an attention_mask of shape (rows, tokens), got {tuple(mask.shape)}")
    if mask is not None and mask.shape[1] != length:
        raise UsageError(
            f"the attention_mask has {mask.shape[1]} columns for {length} tokens; where a text continues, give the cache, too"
        )
    check_positions(real, spec)
    if real is not None and spec.reads_first_token and not bool(real.all()):
        raise UsageError(
            "this base pools each row's first position, which is padding where a row has fewer virtual tokens than another; "
            "run such a batch one adapter at a time"
        )


def input_spec_of(model: nn.Module, accepts: frozenset[str], *, labels_per_token: bool, classifies: bool) -> InputSpec:
    """Read an `InputSpec` off a base model and its config."""
    config = architecture.config_of(model)
    table = architecture.position_table(model)
    encoder_decoder = architecture.is_encoder_decoder(config)
    last = architecture.reads_last_token(model)
    return InputSpec(
        accepts=accepts,
        encoder_decoder=encoder_decoder,
        labels_per_token=labels_per_token and not encoder_decoder,
        last_token_decides=classifies and last,
        first_token_decides=classifies and not last,
        reads_first_token=not classifies and architecture.pools_first_token(model),
        positions=architecture.longest_input(config) if table is not None else None,
        image_positions=architecture.counts_image_positions(model),
        mask_positions="position_ids" in accepts
        and not encoder_decoder
        and (table is None or not architecture.positions_behind_padding(table)),
    )


def fill_in(config: PromptConfig, model: Any) -> None:
    """Fill in the fields of a prompt config that follow from the base, as in the ecosystem's files."""
    dim = architecture.embedding_width(model)
    if config.token_dim not in (None, dim):
        raise ConfigError(f"token_dim={config.token_dim}, but {type(model).__name__} embeds tokens in {dim} dimensions")
    config.token_dim = dim
    base = architecture.config_of(model)
    if architecture.reads_ids_in_layers(base):
        raise ConfigError(
            f"the layers of {type(model).__name__} look tokens up by their ids, which virtual tokens lack; use LoRA"
        )
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    if config.num_layers is None:
        config.num_layers = architecture.layers_in(base)
    if config.num_attention_heads is None:
        config.num_attention_heads = architecture.heads_in(base)


def is_continuation(inputs: dict[str, Any]) -> bool:
    """Whether a call continues from a cache that is not empty."""
    return not cache.is_empty(cache.given(inputs))


def continued(inputs: dict[str, Any], n: int, spec: InputSpec, real: Tensor | None = None, prefix: int = 0) -> dict[str, Any]:
    """The inputs of a later decoding step: the cache already holds the virtual tokens; mask and positions may lack them.

    Positions without a mask count the caller's tokens, as in the first step.

    Args:
        prefix: length of a prefix that the cache holds in addition; the mask lacks it.

    Raises:
        UsageError: the mask has neither a column for each of the caller's tokens so far, nor for virtual ones, too.
    """
    inputs = dict(inputs)
    found, tokens = cache.given(inputs), tokens_of(inputs)
    mask, columns = inputs.get("attention_mask"), cache.length(found) - prefix + tokens.shape[1]
    if cache.length(found) == 0:  # it keeps states, so nothing that came before is masked
        return inputs if mask is None else {**inputs, "attention_mask": mask[:, -tokens.shape[1] :]}
    if mask is None and real is not None:
        mask = torch.ones((tokens.shape[0], columns - n), dtype=torch.long, device=tokens.device)
    if mask is not None:
        if mask.dim() != 2 or mask.shape[1] == columns:
            return inputs
        check_columns(mask, columns, n)
        _check_begun(mask[:, : -tokens.shape[1]])
        mask = inputs["attention_mask"] = prepend(mask, n, 1 if real is None else real).gather(1, _order(mask, n, real, spec))
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = inputs["position_ids"] + counts(n, real)
    elif mask is not None and spec.mask_positions:
        inputs["position_ids"] = counted_positions(mask)[:, -tokens.shape[1] :]
    return inputs


def check_columns(mask: Tensor, columns: int, n: int) -> None:
    """Reject a mask that does not fit what is in the cache."""
    if mask.shape[1] != columns - n:
        raise UsageError(
            f"the attention_mask has {mask.shape[1]} columns, but cache and input hold {columns - n} tokens "
            f"and {n} virtual ones before them; give it a column for each of the {columns - n}"
        )


def _check_begun(mask: Tensor) -> None:
    """Reject rows of which nothing but padding is in the cache: virtual tokens went in before the padding that still comes."""
    if not torch.compiler.is_compiling() and bool((mask.sum(1) == 0).any()):
        raise UsageError(
            "the first tokens of a row were all padding, but virtual tokens come after it; give each row its first token in "
            "the first step (of generate, a larger prefill_chunk_size)"
        )


def check_tasks(found: int, rows: int) -> None:
    """Reject a number of task ids that is not the number of rows."""
    if found != rows:
        raise UsageError(f"{found} task_ids for {rows} rows; give one for each row")


def check_length(length: int, n: int, spec: InputSpec) -> None:
    """Reject an input that leaves no positions for virtual tokens."""
    if spec.positions is not None and length + n > spec.positions:
        raise UsageError(
            f"{length} tokens and {n} virtual tokens need {length + n} positions, but the base has {spec.positions}; "
            f"truncate the input to {spec.positions - n} tokens"
        )


def check_positions(real: Tensor | None, spec: InputSpec) -> None:
    """Reject rows with different numbers of virtual tokens if positions cannot be counted row by row."""
    if real is not None and spec.positions is not None and not spec.mask_positions and not bool(real.all()):
        raise UsageError(
            "this base counts positions from the first column, so rows of one batch cannot have different numbers of "
            "virtual tokens; run such a batch one adapter at a time"
        )


def _order(mask: Tensor, n: int, real: Tensor | None, spec: InputSpec) -> Tensor:
    """`(B, n + T)` indices that sort each row (stable): padding at the left, virtual tokens, the rest."""
    is_padding = mask == 0 if spec.last_token_decides or spec.first_token_decides else mask.cumsum(1) == 0
    place_of_padding = 3 if spec.first_token_decides else 0
    rank = torch.where(is_padding, place_of_padding, 2)
    rank = prepend(rank, n, 1 if real is None else torch.where(real, 1, place_of_padding))
    return rank.argsort(dim=1, stable=True)
