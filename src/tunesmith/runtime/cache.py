"""The cache of keys and values: the one place that knows its classes and what forwards call it.

transformers renamed the argument: `past_key_values` up to 5.23, `cache` from 5.24, and `layer_past` in a few older
attentions of both. A module is asked what its own forward calls it (`cache_name`), since a model whose code comes with its
weights may keep the old name under a new release. Callers may use any of the names (`given`), as transformers lets them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from ..bases.architecture import is_encoder_decoder, text_config

NAMES = ("cache", "past_key_values", "layer_past")

KeysAndValues = tuple[Tensor, Tensor]  # of one layer, `(B, heads, n, head_dim)` each


def cache_name(module: nn.Module) -> str | None:
    """What the module's forward calls the cache; None where it takes none."""
    return name_in(type(module).forward)


def name_in(forward: Callable[..., Any]) -> str | None:
    """What a forward calls the cache. A signature shows the name behind transformers' decorators, which is the new one."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def given(inputs: dict[str, Any]) -> Any:
    """The cache among a call's keyword arguments, whatever it is called there; None where there is none."""
    return next((inputs[name] for name in NAMES if inputs.get(name) is not None), None)


def with_cache(inputs: dict[str, Any], name: str, cache: Any) -> dict[str, Any]:
    """Keyword arguments that hold `cache` under one name only: under two, transformers refuses them."""
    return {**{key: value for key, value in inputs.items() if key not in NAMES}, name: cache}


def is_cache(value: Any) -> bool:
    """Whether an argument is a cache, of transformers or of a model's own code."""
    return hasattr(value, "get_seq_length")


def length(cache: Any) -> int:
    """How many tokens a cache holds; 0 where there is none."""
    return int(cache.get_seq_length()) if is_cache(cache) else 0


def is_fixed(cache: Any) -> bool:
    """Whether a cache was laid out for a number of tokens, so that it has no room for more."""
    return bool(getattr(cache, "is_compileable", False))


def empty(config: Any) -> Cache:
    """A cache that grows, for a model of this configuration."""
    own = DynamicCache(config=text_config(config))
    return _beside_cross_attention(own, config)


def layer_count(config: Any) -> int | None:
    """How many layers keep keys and values; None where some keep something else in their place."""
    layers = DynamicCache(config=text_config(config)).layers
    return len(layers) if all(isinstance(layer, DynamicLayer) for layer in layers) else None


def append(cache: Any, layers: Sequence[KeysAndValues]) -> None:
    """Put keys and values of every layer's self-attention behind what the cache holds."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for index, (keys, values) in enumerate(layers):
        own.update(keys, values, index)


def expand(cache: Any, rows: int) -> bool:
    """Let a cache of one row serve a batch, without copying; False where a layer keeps no keys and values."""
    layers: list[Any] = cache.layers
    if not all(isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None for layer in layers):
        return False
    for layer in layers:
        layer.keys, layer.values = layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)
    return True


def holding(layers: Sequence[KeysAndValues], config: Any) -> Cache:
    """A cache that holds these keys and values and takes up no more."""
    return _beside_cross_attention(Cache(layers=[HeldLayer(*layer) for layer in layers]), config)


def holding_one(keys: Tensor, values: Tensor, index: int) -> Cache:
    """A cache for one layer alone, the one of that index, that takes up no more."""
    return Cache(layers=[HeldLayer(keys, values)] * (index + 1))


class HeldLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values, which stay as they are: those of a call are put behind them and not kept."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeysAndValues:
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def _beside_cross_attention(own: Cache, config: Any) -> Cache:
    """The cache of self-attentions, with one for what a decoder reads of its encoder where there is one."""
    text = text_config(config)
    return EncoderDecoderCache(own, DynamicCache(config=text)) if is_encoder_decoder(text) else own
