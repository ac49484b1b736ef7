"""The key-value cache: the only module that knows its classes and the name of its argument.

transformers renamed the argument: `past_key_values` up to 5.23, `cache` from 5.24, and `layer_past` in a few older
attentions of both. Each module's own signature is consulted (`cache_name`), since a model that ships its own code may keep
the old name under a new release. Callers may use any of the names (`given`), as in transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from ..bases.architecture import is_encoder_decoder, text_config

NAMES = ("cache", "past_key_values", "layer_past")
STATES = "cache_params"  # the same argument of models that keep states instead of keys and values, up to 5.23

KeysAndValues = tuple[Tensor, Tensor]  # of one layer, `(B, heads, n, head_dim)` each


def cache_name(module: nn.Module) -> str | None:
    """The name of the module's cache argument; None if its forward takes no cache."""
    return name_in(type(module).forward)


def name_in(forward: Callable[..., Any]) -> str | None:
    """The name of a forward's cache argument. Behind transformers' decorators the signature shows the new name."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def given(inputs: dict[str, Any]) -> Any:
    """The cache among a call's keyword arguments, under any of its names; None if there is none."""
    return next((inputs[name] for name in (*NAMES, STATES) if inputs.get(name) is not None), None)


def with_cache(inputs: dict[str, Any], name: str, cache: Any) -> dict[str, Any]:
    """Keyword arguments with `cache` under this name only: transformers rejects two names at once."""
    return {**{key: value for key, value in inputs.items() if key not in NAMES}, name: cache}


def is_cache(value: Any) -> bool:
    """Whether an argument is a cache, either transformers' own or one from a model's code."""
    return hasattr(value, "get_seq_length")


def length(cache: Any) -> int:
    """Number of tokens in a cache; 0 if there is none, or if it keeps states, which have no length."""
    return int(cache.get_seq_length()) if is_cache(cache) and not _keeps_states(cache) else 0


def is_empty(cache: Any) -> bool:
    """Whether no token went into a cache yet, or there is none."""
    return not cache.has_previous_state() if is_cache(cache) and _keeps_states(cache) else length(cache) == 0


def _keeps_states(cache: Any) -> bool:
    """Whether all layers of a cache keep a state (Mamba) and none keeps keys."""
    layers = getattr(cache, "layers", [])
    return bool(layers) and not any(hasattr(layer, "get_seq_length") for layer in layers)


def is_fixed(cache: Any) -> bool:
    """Whether a cache was allocated for a fixed number of tokens, so that it cannot grow."""
    own = getattr(cache, "self_attention_cache", cache)
    return isinstance(own, StaticCache) or bool(getattr(own, "is_compileable", False))


def is_laid_out(implementation: str | None) -> bool:
    """Whether `generate(cache_implementation=...)` allocates a cache for a fixed number of tokens."""
    return implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS and implementation != "hybrid"  # which means "dynamic" today


def crops_from_the_end() -> bool:
    """Whether caches are cropped by a number of tokens to remove; in older releases by the length of the text that stays."""
    return "tokens_to_remove" in inspect.signature(Cache.crop).parameters


def is_paged(cache: Any) -> bool:
    """Whether a cache is the one of continuous batching, which keeps the texts of a row apart itself."""
    return type(cache).__name__ == "PagedAttentionCache"


def empty(config: Any) -> Cache:
    """A growing cache for a model with this configuration."""
    own = DynamicCache(config=text_config(config))
    return _beside_cross_attention(own, config)


def layer_count(config: Any) -> int | None:
    """Number of layers that keep keys and values; None if some layers keep something else instead."""
    layers = DynamicCache(config=text_config(config)).layers
    keys_alone = all(isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states") for layer in layers)
    return len(layers) if keys_alone else None


def append(cache: Any, layers: Sequence[KeysAndValues]) -> None:
    """Append keys and values to every self-attention layer of the cache."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for index, (keys, values) in enumerate(layers):
        own.update(keys, values, index)


def expand(cache: Any, rows: int) -> bool:
    """Let a cache of one row serve a batch, without copying; False if a layer keeps no keys and values."""
    layers: list[Any] = cache.layers
    if not all(isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None for layer in layers):
        return False
    for layer in layers:
        layer.keys, layer.values = layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)
    return True


def holding(layers: Sequence[KeysAndValues], config: Any) -> Cache:
    """A read-only cache with these keys and values."""
    return _beside_cross_attention(Cache(layers=[HeldLayer(*layer) for layer in layers]), config)


def holding_one(keys: Tensor, values: Tensor, index: int) -> Cache:
    """A read-only cache for a single layer, the one with this index."""
    return Cache(layers=[HeldLayer(keys, values)] * (index + 1))


class HeldLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's fixed keys and values: those of a call are appended for that call and not kept."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeysAndValues:
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def without_held(result: Any) -> Any:
    """A module's result without a cache of fixed keys and values: it holds nothing of the text that a caller would continue."""

    def is_held(value: Any) -> bool:
        own = getattr(value, "self_attention_cache", value)
        return isinstance(own, Cache) and any(isinstance(layer, HeldLayer) for layer in own.layers)

    if isinstance(result, tuple):
        return tuple(value for value in result if not is_held(value))
    for name in NAMES:
        if is_held(getattr(result, name, None)):
            result[name] = None
    return result


def _beside_cross_attention(own: Cache, config: Any) -> Cache:
    """The self-attention cache; for an encoder-decoder, paired with one for its cross-attention."""
    text = text_config(config)
    return EncoderDecoderCache(own, DynamicCache(config=text)) if is_encoder_decoder(text) else own
