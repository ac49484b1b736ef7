"""Prefixes: trained keys and values that every self-attention layer attends to before those of the tokens.

They are inserted into the model's cache of past keys and values. `PrefixedStack` wraps the stack of layers: it fills the
cache at the first step and extends the mask, so forward calls, `generate` with beams, and hand-written decoding loops all
take the same path. Gradient checkpointing removes the cache from the layers it recomputes, so `PrefixedAttention` wraps each
attention and computes the prefix again: recomputation is deterministic, and its gradients reach the parameters whether
checkpointing is reentrant or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import PromptAdapter
from ..bases import architecture
from ..bases.view import execution_device
from ..config import PromptConfig
from ..errors import ConfigError, UsageError
from . import cache, site
from .cache import cache_name
from .frame import Around, Frame, Mixture, current_frame
from .rows import counted_positions, counts, embedded, prepend, shifted_positions, tokens_of
from .virtual_tokens import InputSpec, check_columns, check_length, check_positions, input_spec_of, virtual_counts

Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, `(B, heads, n, head_dim)` or without B


@dataclass(frozen=True)
class Stack:
    """Where a prefix is inserted.

    Args:
        path: the module that runs the layers; of an encoder-decoder, the one in the decoder.
        attentions: path of each layer's self-attention.
        heads, head_dim: shape of the keys; with grouped-query attention there are fewer heads than for queries.
    """

    path: str
    attentions: tuple[str, ...]
    heads: int
    head_dim: int


def find_stack(model: Any) -> Stack:
    """Find where a model's layers take past keys and values.

    Raises:
        ConfigError: no layer takes them, or the layers differ.
    """
    name = type(model).__name__
    modules = dict(model.named_modules())
    has_encoder = architecture.is_encoder_decoder(architecture.config_of(model))
    inside = set(model.get_decoder().modules()) if has_encoder else set(modules.values())
    attentions: dict[int, str] = {}
    for path, module in modules.items():
        index = architecture.layer_index(module)
        if module in inside and index is not None and cache_name(module) and not _holds_attention(module):
            attentions.setdefault(index, path)  # a decoder's cross-attention has the same index, but comes second
    stacks = {_stack_of(path, modules) for path in attentions.values()}
    if len(stacks) != 1 or None in stacks:
        raise ConfigError(f"prefix tuning needs layers that take past keys and values, but {name} has none; use prompt tuning")
    stack = stacks.pop()
    assert stack is not None
    config = modules[stack].config
    layers = cache.layer_count(config)
    if layers is None or sorted(attentions) != list(range(layers)):
        raise ConfigError(
            f"prefix tuning needs keys and values in every layer, but {name} lacks them in some; use prompt tuning"
        )
    if architecture.compresses_keys(config):
        raise ConfigError(
            f"prefix tuning needs keys and values of the same size, but those of {name} differ; use prompt tuning"
        )
    shapes = architecture.key_shapes(config, layers)
    if len(shapes) > 1 or architecture.shares_keys(config):
        raise ConfigError(f"prefix tuning needs layers of the same shape, but those of {name} differ; use prompt tuning")
    for path in (stack, *attentions.values()):
        reason = site.fault(modules[path])
        if reason:
            raise ConfigError(f"{path or name}: {reason}")
    heads, head_dim = shapes.pop()
    return Stack(stack, tuple(attentions[index] for index in range(layers)), heads, head_dim)


def fill_in(config: PromptConfig, model: nn.Module) -> None:
    """Fill in the fields of a prefix config that follow from the base, as in the ecosystem's files.

    Raises:
        ConfigError: the base cannot take a prefix, or not one of the config's size.
    """
    stack = find_stack(model)
    sizes = {
        "num_layers": len(stack.attentions),
        "num_attention_heads": stack.heads,
        "token_dim": stack.heads * stack.head_dim,
    }
    for field, size in sizes.items():
        given = getattr(config, field)
        if given not in (None, size):
            raise ConfigError(f"{field}={given}, but the keys of {type(model).__name__} have {size}; leave it out")
        setattr(config, field, size)
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if architecture.is_encoder_decoder(architecture.config_of(model)) else 1


def places(prompt: PromptAdapter, model: nn.Module) -> Iterator[tuple[str, Around]]:
    """`(path, wrapper of the module there)` for one prefix."""
    stack = find_stack(model)
    attentions = [model.get_submodule(path) for path in stack.attentions]
    yield stack.path, PrefixedStack(prompt, model.get_submodule(stack.path), attentions)
    for index, (path, attention) in enumerate(zip(stack.attentions, attentions)):
        yield path, PrefixedAttention(prompt, index, attention)


class PrefixedStack(Around):
    """Wraps the module that runs the layers: the first step starts with the prefix in the cache."""

    def __init__(self, prompt: PromptAdapter, stack: Any, attentions: list[nn.Module]) -> None:
        self.prompt = prompt
        self.stack = stack
        self.attentions = attentions
        self.names = tuple(inspect.signature(type(stack).forward).parameters)[1:]
        self.spec = input_spec_of(stack, frozenset(self.names), labels_per_token=False, classifies=False)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(self.names, args)), **kwargs}
        layers = None
        if is_first_step(inputs):
            layers = [self.prompt(i).to(execution_device(a), self.stack.dtype) for i, a in enumerate(self.attentions)]
        result = call(**extend(inputs, layers, self.prompt.config.num_virtual_tokens, self.stack, self.spec))
        return cache.without_held(result)

    def by_rows(self, parts: list[Any], mixture: Mixture, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(self.names, args)), **kwargs}
        rows = tokens_of(inputs).shape[0]
        counts = [0 if part is None else part.prompt.config.num_virtual_tokens for part in parts]
        layers = None
        if is_first_step(inputs):
            found = ((_mixed_layer(parts, mixture, i, rows), a) for i, a in enumerate(self.attentions))
            layers = [layer.to(execution_device(a), self.stack.dtype) for layer, a in found]
        result = call(**extend(inputs, layers, max(counts), self.stack, self.spec, mixture.real(counts, rows)))
        return cache.without_held(result)


class PrefixedAttention(Around):
    """Wraps one layer's self-attention: restores the prefix where gradient checkpointing removed the cache."""

    def __init__(self, prompt: PromptAdapter, layer: int, attention: nn.Module) -> None:
        self.prompt = prompt
        self.layer = layer
        self.names = tuple(inspect.signature(type(attention).forward).parameters)[1:]
        self.cache_name = cache_name(attention) or ""

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(**self._with_prefix(args, kwargs, lambda rows: self.prompt(self.layer)))

    def by_rows(self, parts: list[Any], mixture: Mixture, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(**self._with_prefix(args, kwargs, lambda rows: _mixed_layer(parts, mixture, self.layer, rows)))

    def _with_prefix(self, args: tuple[Any, ...], kwargs: dict[str, Any], layer_for: Callable[[int], Tensor]) -> dict[str, Any]:
        """The inputs; if they have no cache, with one that holds the layer's keys and values."""
        inputs = {**dict(zip(self.names, args)), **kwargs}
        if cache.given(inputs) is not None:
            return inputs
        hidden = inputs[self.names[0]]  # (B, T, dim)
        rows = hidden.shape[0]
        keys, values = _for_rows(layer_for(rows).to(hidden.device, hidden.dtype), rows)
        return cache.with_cache(inputs, self.cache_name, cache.holding_one(keys, values, self.layer))


def extend(
    inputs: dict[str, Any], layers: Any, n: int, stack: Any, spec: InputSpec, real: Tensor | None = None
) -> dict[str, Any]:
    """The inputs of a call of the stack with a prefix in its cache.

    Args:
        inputs: keyword arguments of the stack's forward; not changed.
        layers: each layer's keys and values, `(2, heads, n, head_dim)`, or other ones for each row,
            `(2, B, heads, n, head_dim)`; None in later steps, when the cache already holds them.
        n: length of the prefix.
        real: `(B, n)`, which of its tokens a row has (the others are padding); None if every row has all of them.
    """
    inputs = dict(inputs)
    tokens = tokens_of(inputs)
    rows, length = tokens.shape[:2]
    seen = 0
    if layers is not None:
        frame = current_frame()
        packed = None if frame is None else frame.segments
        check_length(length if packed is None else packed.longest, n, spec)
        expanded = [_for_rows(layer, rows) for layer in layers]
        filled = _filled(cache.given(inputs), expanded, stack, _stores(inputs, stack))
        inputs = cache.with_cache(inputs, cache_name(stack) or "", filled)
    else:
        seen = cache.length(cache.given(inputs)) - n
    check_positions(real, spec)
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise UsageError(
            f"prefix tuning needs an attention_mask of shape (rows, tokens), got {found}; where the model "
            "itself makes such masks, use prompt tuning"
        )
    if mask is None and real is not None:
        mask = torch.ones((rows, seen + length), dtype=torch.long, device=tokens.device)
    if mask is not None and mask.shape[1] == seen + length + n:
        return inputs  # the caller's mask already includes the prefix, and so do the positions
    if mask is not None:
        check_columns(mask, seen + length + n, n)
        _check_window(mask, n, stack)
        mask = inputs["attention_mask"] = prepend(mask, n, 1 if real is None else real)
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = inputs["position_ids"] + counts(n, real)
    elif mask is not None and spec.mask_positions:
        inputs["position_ids"] = counted_positions(mask)[:, -length:]
    return inputs


def _check_window(mask: Tensor, n: int, stack: Any) -> None:
    """Reject padding between a prefix and its text where attention counts columns, so that it would come to see less."""
    window = architecture.column_window(stack.config)
    if window is None or n + mask.shape[1] <= window or torch.compiler.is_compiling():
        return
    if bool((mask[:, 0] == 0).any()):
        raise UsageError(
            f"a prefix stands before left padding, which {type(stack).__name__} counts among the {window} columns that a token "
            "sees; pad at the right, give rows of equal lengths, or use prompt tuning"
            if window
            else f"a prefix stands before left padding, and {type(stack).__name__} counts distances in columns; pad at the "
            "right, give rows of equal lengths, or use prompt tuning"
        )


def with_columns(base: Any, frame: Frame, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a text whose beginning is in a cache, with a column in front for each token of the prefix there."""
    inputs, mixture = dict(inputs), frame.mixture
    embeds = embedded(inputs, base.get_input_embeddings())  # (B, T, dim)
    rows, length = embeds.shape[:2]
    lengths = [virtual_counts(part, in_cache=True) for part in (mixture.frames if mixture else [frame])]
    n, real = max(lengths), mixture.real(lengths, rows) if mixture else None
    if inputs.get("attention_mask") is None:
        inputs["attention_mask"] = torch.ones((rows, length), dtype=torch.long, device=embeds.device)
    per_token: dict[str, Any] = {"attention_mask": 1 if real is None else real, "token_type_ids": 0, "mm_token_type_ids": 0}
    inputs |= {name: prepend(inputs[name], n, fill) for name, fill in per_token.items() if inputs.get(name) is not None}
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = shifted_positions(inputs["position_ids"], n, real)
    return {**inputs, "inputs_embeds": torch.cat([embeds.new_zeros(rows, n, embeds.shape[-1]), embeds], dim=1)}


def _mixed_layer(parts: list[Any], mixture: Mixture, layer: int, rows: int) -> Tensor:
    """One layer's keys and values of a mixed batch, `(2, B, heads, n, head_dim)`."""
    return mixture.stacked([None if part is None else part.prompt(layer) for part in parts], 4, rows).movedim(1, 0)


def is_first_step(inputs: dict[str, Any]) -> bool:
    """Whether a call of the stack starts a text, so that the prefix is not in its cache yet.

    Raises:
        UsageError: the cache has a fixed size, with no room for a prefix.
    """
    found = cache.given(inputs)
    if found is None:
        return True
    if cache.is_fixed(found):
        raise UsageError("prefix tuning needs a cache that can grow; leave out cache_implementation, or use a DynamicCache")
    return cache.length(found) == 0


def _holds_attention(module: nn.Module) -> bool:
    """Whether the module contains another attention (some layers have an index, too)."""
    return any(architecture.layer_index(m) is not None and cache_name(m) for m in module.modules() if m is not module)


def _stack_of(path: str, modules: dict[str, nn.Module]) -> str | None:
    """The nearest module that contains an attention and takes whole texts and a cache."""
    while path:
        path = path.rpartition(".")[0]
        if "inputs_embeds" in inspect.signature(type(modules[path]).forward).parameters and cache_name(modules[path]):
            return path
    return None


def _for_rows(layer: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A layer's keys and values, `(B, heads, n, head_dim)` each, without copying."""
    keys, values = layer
    return keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)


def _stores(inputs: dict[str, Any], stack: Any) -> bool:
    """Whether the cache should also store the tokens' keys and values: not if layers may be recomputed."""
    wanted = inputs.get("use_cache")
    wanted = architecture.caches_by_default(stack.config) if wanted is None else wanted
    if not wanted or not stack.training:
        return bool(wanted)
    return not any(architecture.recomputes(module) for module in stack.modules())


def _filled(given: Any, layers: Layers, stack: Any, stores: bool) -> Any:
    """The given (empty) cache, or a new one, with the prefix in it."""
    if not stores and given is None:
        return cache.holding(layers, stack.config)
    filled = cache.empty(stack.config) if given is None else given
    cache.append(filled, layers)
    return filled
