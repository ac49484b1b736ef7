"""Prefixes: trained keys and values that every self-attention layer sees before those of the tokens.

They enter where a model keeps past keys and values. Around the stack of layers (`PrefixedStack`) stands what fills the
cache at the first step and lengthens the mask; so forward calls, `generate` with its beams, and decoding loops written
by hand take the same way. Gradient checkpointing takes the cache away from the layers it recomputes, so around every
attention (`PrefixedAttention`) stands what gives it the prefix again, computed anew: recomputing is repeatable, and its
gradients reach the parameters whether checkpointing is reentrant or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from ..adapter import PromptAdapter
from ..bases.view import execution_device
from ..config import PromptConfig
from ..errors import ConfigError, UsageError
from . import site
from .frame import Around, Mixture, current_frame
from .virtual_tokens import InputSpec, check_length, check_positions, counted_positions, counts, input_spec_of, prepend

CACHE_NAMES = ("past_key_values", "layer_past")  # what attentions call the cache

Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, `(B, heads, n, head_dim)` or without B


@dataclass(frozen=True)
class Stack:
    """Where a prefix enters.

    Args:
        path: the module that runs the layers, of a model with an encoder and a decoder the decoder's.
        attentions: path of each layer's self-attention.
        heads, head_dim: shape of the keys; fewer heads than the queries have under grouped-query attention.
    """

    path: str
    attentions: tuple[str, ...]
    heads: int
    head_dim: int


def find_stack(model: Any) -> Stack:
    """Read off a model where its layers take past keys and values.

    Raises:
        ConfigError: it has no layers that do, or not all of them alike.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    modules = dict(model.named_modules())
    inside = set(model.get_decoder().modules()) if getattr(config, "is_encoder_decoder", False) else set(modules.values())
    attentions: dict[int, str] = {}
    for path, module in modules.items():
        index = getattr(module, "layer_idx", None)
        if module in inside and isinstance(index, int) and cache_name(module) and not _holds_attention(module):
            attentions.setdefault(index, path)  # a decoder's cross-attention has its layer's index, too, but comes second
    stacks = {_stack_of(path, modules) for path in attentions.values()}
    if len(stacks) != 1 or None in stacks:
        raise ConfigError(f"prefix tuning needs layers that take past keys and values, {name} has none; use prompt tuning")
    stack = stacks.pop()
    assert stack is not None
    text = modules[stack].config.get_text_config(decoder=True)
    layers = DynamicCache(config=text).layers
    if sorted(attentions) != list(range(len(layers))) or not all(isinstance(layer, DynamicLayer) for layer in layers):
        raise ConfigError(f"prefix tuning needs keys and values in every layer, {name} lacks them in some; use prompt tuning")
    if getattr(text, "kv_lora_rank", None):
        raise ConfigError(f"prefix tuning needs keys and values of one size, those of {name} differ; use prompt tuning")
    shapes = {_key_shape(text.per_layer_config[index]) for index in range(len(layers))}
    if len(shapes) > 1 or getattr(text, "num_kv_shared_layers", None):
        raise ConfigError(f"prefix tuning needs layers of one shape, {name} has several; use prompt tuning")
    for path in (stack, *attentions.values()):
        reason = site.fault(modules[path])
        if reason:
            raise ConfigError(f"{path or name}: {reason}")
    heads, head_dim = shapes.pop()
    return Stack(stack, tuple(attentions[index] for index in range(len(layers))), heads, head_dim)


def _key_shape(config: Any) -> tuple[int, int]:
    """Heads and width of a layer's keys."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1, head_dim
    return getattr(config, "num_key_value_heads", None) or heads, head_dim


def fill_in(config: PromptConfig, model: nn.Module) -> None:
    """Fill the fields of a prefix config that follow from the base, as the ecosystem's files hold them.

    Raises:
        ConfigError: the base has no place for a prefix, or not one of the size the config says.
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
        config.num_transformer_submodules = 2 if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else 1


def places(prompt: PromptAdapter, model: nn.Module) -> Iterator[tuple[str, Around]]:
    """`(path, what stands around the module there)` for one prefix."""
    stack = find_stack(model)
    attentions = [model.get_submodule(path) for path in stack.attentions]
    yield stack.path, PrefixedStack(prompt, model.get_submodule(stack.path), attentions)
    for index, (path, attention) in enumerate(zip(stack.attentions, attentions)):
        yield path, PrefixedAttention(prompt, index, attention)


class PrefixedStack(Around):
    """Around the module that runs the layers: the first step starts from a cache that holds the prefix."""

    def __init__(self, prompt: PromptAdapter, stack: Any, attentions: list[nn.Module]) -> None:
        self.prompt = prompt
        self.stack = stack
        self.attentions = attentions
        self.names = tuple(inspect.signature(type(stack).forward).parameters)[1:]
        self.entrance = input_spec_of(stack, frozenset(self.names), labels_per_token=False, classifies=False)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(self.names, args)), **kwargs}
        layers = None
        if is_first_step(inputs):
            layers = [self.prompt(i).to(execution_device(a), self.stack.dtype) for i, a in enumerate(self.attentions)]
        return call(**extend(inputs, layers, self.prompt.config.num_virtual_tokens, self.stack, self.entrance))

    def by_rows(self, parts: list[Any], mixture: Mixture, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(self.names, args)), **kwargs}
        tokens = inputs.get("input_ids")
        rows = (inputs["inputs_embeds"] if tokens is None else tokens).shape[0]
        counts = [0 if part is None else part.prompt.config.num_virtual_tokens for part in parts]
        layers = None
        if is_first_step(inputs):
            found = ((_mixed_layer(parts, mixture, i, rows), a) for i, a in enumerate(self.attentions))
            layers = [layer.to(execution_device(a), self.stack.dtype) for layer, a in found]
        return call(**extend(inputs, layers, max(counts), self.stack, self.entrance, mixture.real(counts, rows)))


class PrefixedAttention(Around):
    """Around one layer's self-attention: gives it the prefix where gradient checkpointing took the cache away."""

    def __init__(self, prompt: PromptAdapter, layer: int, attention: nn.Module) -> None:
        self.prompt = prompt
        self.layer = layer
        self.names = tuple(inspect.signature(type(attention).forward).parameters)[1:]
        self.cache_name = cache_name(attention) or ""

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(**self._given_back(args, kwargs, lambda rows: self.prompt(self.layer)))

    def by_rows(self, parts: list[Any], mixture: Mixture, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(**self._given_back(args, kwargs, lambda rows: _mixed_layer(parts, mixture, self.layer, rows)))

    def _given_back(self, args: tuple, kwargs: dict[str, Any], layer_for: Callable[[int], Tensor]) -> dict[str, Any]:
        """The inputs, with a cache that holds the layer's keys and values where there is none."""
        inputs = {**dict(zip(self.names, args)), **kwargs}
        if inputs.get(self.cache_name) is None:
            hidden = inputs[self.names[0]]  # (B, T, dim)
            rows = hidden.shape[0]
            one = PrefixLayer(*_for_rows(layer_for(rows).to(hidden.device, hidden.dtype), rows))
            inputs[self.cache_name] = Cache(layers=[one] * (self.layer + 1))
        return inputs


class PrefixLayer(DynamicLayer):
    """One layer's cache that holds a prefix and never anything more."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def extend(
    inputs: dict[str, Any], layers: Any, n: int, stack: Any, entrance: InputSpec, real: Tensor | None = None
) -> dict[str, Any]:
    """The inputs of a call of the stack with a prefix in its cache.

    Args:
        inputs: keyword arguments of the stack's forward; not changed.
        layers: each layer's keys and values, `(2, heads, n, head_dim)`, or other ones for each row,
            `(2, B, heads, n, head_dim)`; None in later steps, when the cache holds them already.
        n: how many columns the prefix has.
        real: `(B, n)`, which of them a row has (the others are padding); None where all rows have all.
    """
    inputs = dict(inputs)
    tokens = inputs.get("input_ids")
    tokens = inputs["inputs_embeds"] if tokens is None else tokens
    rows, length = tokens.shape[:2]
    seen = 0
    if layers is not None:
        frame = current_frame()
        packed = None if frame is None else frame.segments
        check_length(length if packed is None else packed.longest, n, entrance)
        expanded = [_for_rows(layer, rows) for layer in layers]
        inputs["past_key_values"] = _filled(inputs.get("past_key_values"), expanded, stack, _stores(inputs, stack))
    else:
        seen = inputs["past_key_values"].get_seq_length() - n
    check_positions(real, entrance)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise UsageError(f"prefix tuning needs an attention_mask of shape (rows, tokens), got {tuple(mask.shape)}")
    if mask is None and real is not None:
        mask = torch.ones((rows, seen + length), dtype=torch.long, device=tokens.device)
    if mask is not None and mask.shape[1] != seen + length:
        return inputs  # the caller's mask counts the prefix, and so do the positions
    if mask is not None:
        mask = inputs["attention_mask"] = prepend(mask, n, 1 if real is None else real)
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = inputs["position_ids"] + counts(n, real)
    elif mask is not None and entrance.mask_positions:
        inputs["position_ids"] = counted_positions(mask)[:, -length:]
    return inputs


def _mixed_layer(parts: list[Any], mixture: Mixture, layer: int, rows: int) -> Tensor:
    """One layer's keys and values of a mixed batch, `(2, B, heads, n, head_dim)`."""
    return mixture.stacked([None if part is None else part.prompt(layer) for part in parts], 4, rows).movedim(1, 0)


def is_first_step(inputs: dict[str, Any]) -> bool:
    """Whether a call of the stack starts a text, so that the prefix is not in its cache yet.

    Raises:
        UsageError: the cache is of a fixed size, which has no room for a prefix.
    """
    cache = inputs.get("past_key_values")
    if cache is None:
        return True
    if getattr(cache, "is_compileable", False):
        raise UsageError("prefix tuning needs a cache that can grow; leave out cache_implementation, or take a DynamicCache")
    return cache.get_seq_length() == 0


def cache_name(module: nn.Module) -> str | None:
    """What the module's forward calls the cache; None where it takes none."""
    parameters = inspect.signature(type(module).forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def _holds_attention(module: nn.Module) -> bool:
    """Whether another attention is inside (some layers bear their index, too)."""
    return any(isinstance(getattr(m, "layer_idx", None), int) and cache_name(m) for m in module.modules() if m is not module)


def _stack_of(path: str, modules: dict[str, nn.Module]) -> str | None:
    """The nearest module around an attention that takes a whole text and a cache."""
    while path:
        path = path.rpartition(".")[0]
        if {"inputs_embeds", "past_key_values"} <= set(inspect.signature(type(modules[path]).forward).parameters):
            return path
    return None


def _for_rows(layer: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A layer's keys and values, `(B, heads, n, head_dim)` each, without copying."""
    keys, values = layer
    return keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)


def _stores(inputs: dict[str, Any], stack: Any) -> bool:
    """Whether the cache is to take up the tokens' keys and values, too: not where layers may be recomputed."""
    wanted = inputs.get("use_cache")
    wanted = getattr(stack.config, "use_cache", False) if wanted is None else wanted
    if not wanted or not stack.training:
        return bool(wanted)
    return not any(getattr(module, "gradient_checkpointing", False) for module in stack.modules())


def _filled(given: Any, layers: Layers, stack: Any, stores: bool) -> Cache:
    """The (empty) cache that was given, or a new one, with the prefix in it."""
    config = stack.config.get_text_config(decoder=True)
    crossed = bool(getattr(config, "is_encoder_decoder", False))
    if not stores and given is None:
        prefix = Cache(layers=[PrefixLayer(keys, values) for keys, values in layers])
        return EncoderDecoderCache(prefix, DynamicCache(config=config)) if crossed else prefix
    cache = given
    if cache is None:
        cache = DynamicCache(config=config)
        cache = EncoderDecoderCache(cache, DynamicCache(config=config)) if crossed else cache
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for index, (keys, values) in enumerate(layers):
        own.update(keys, values, index)
    return cache
