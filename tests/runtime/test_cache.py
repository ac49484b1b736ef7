"""The owner of the cache: both spellings of its argument, whatever release of transformers is installed."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache

from tests import tiny
from tunesmith.runtime import cache


class Old(nn.Module):
    """What transformers' modules are up to 5.23."""

    def forward(self, inputs_embeds=None, past_key_values=None, use_cache=None):
        return past_key_values


def renamed(function):
    """As transformers' decorator on the forwards of 5.24 does it."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if "past_key_values" in kwargs:
            if "cache" in kwargs:
                raise ValueError("both `cache` and `past_key_values`")
            kwargs["cache"] = kwargs.pop("past_key_values")
        return function(*args, **kwargs)

    return wrapped


class New(nn.Module):
    """What they are from 5.24 on."""

    @renamed
    def forward(self, inputs_embeds=None, cache=None, use_cache=None):
        return cache


class OldAttention(nn.Module):
    """Bloom's, under either release."""

    def forward(self, hidden_states, layer_past=None):
        return layer_past


FAKES = {"past_key_values": Old, "cache": New, "layer_past": OldAttention}


@pytest.mark.parametrize("name", FAKES)
def test_a_module_is_asked_what_its_forward_calls_the_cache(name):
    assert cache.cache_name(FAKES[name]()) == name


def test_forwards_without_a_cache_have_no_name():
    assert cache.cache_name(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", tiny.GENERATING)
def test_the_name_is_the_one_of_the_installed_release(name):
    model = tiny.make(name)
    found = cache.cache_name(model)
    assert found in ("cache", "past_key_values") and found in inspect.signature(model.forward).parameters


@pytest.mark.parametrize("spelt", cache.NAMES)
@pytest.mark.parametrize("module", [Old, New])
def test_whatever_a_caller_calls_it_the_module_gets_it(spelt, module):
    given, own = cache.empty(tiny.make("llama").config), module()
    inputs = {spelt: given, "use_cache": True}
    assert cache.given(inputs) is given
    passed_on = cache.with_cache(inputs, cache.cache_name(own), cache.given(inputs))
    assert own(**passed_on) is given and len(passed_on) == 2 and inputs == {spelt: given, "use_cache": True}


@pytest.mark.parametrize("inputs", [{}, {"past_key_values": None}, {"cache": None, "layer_past": None}])
def test_none_is_no_cache(inputs):
    assert cache.given(inputs) is None and cache.length(cache.given(inputs)) == 0


def test_one_of_two_names_is_left_so_that_transformers_takes_the_call():
    old, new = object(), object()
    with pytest.raises(ValueError, match="both"):
        New()(cache=new, past_key_values=old)
    assert New()(**cache.with_cache({"past_key_values": old}, "cache", new)) is new


def test_a_new_cache_grows_and_knows_what_it_holds():
    config = tiny.make("llama").config
    made = cache.empty(config)
    assert cache.is_cache(made) and not cache.is_fixed(made) and cache.length(made) == 0
    cache.append(made, keys_and_values(3))
    cache.append(made, keys_and_values(2))
    assert cache.length(made) == 5 and cache.layer_count(config) == 2


def test_a_cache_laid_out_for_a_number_of_tokens_is_fixed():
    assert cache.is_fixed(StaticCache(config=tiny.make("llama").config, max_cache_len=8))


@pytest.mark.parametrize(
    "value, expected", [(None, False), (torch.ones(2), False), ((torch.ones(1),), False), (DynamicCache(), True)]
)
def test_caches_are_told_from_other_arguments(value, expected):
    assert cache.is_cache(value) is expected


@pytest.mark.parametrize("name, crossed", [("llama", False), ("t5", True), ("mt5", True)])
def test_decoders_with_an_encoder_have_a_second_cache(name, crossed):
    config = tiny.make(name).config
    for made in (cache.empty(config), cache.holding(keys_and_values(3), config)):
        assert isinstance(made, EncoderDecoderCache) is crossed
    made = cache.empty(config)
    cache.append(made, keys_and_values(3))
    assert cache.length(made) == 3


def test_one_row_serves_a_batch_without_a_copy():
    made = cache.empty(tiny.make("llama").config)
    assert not cache.expand(made, 4)  # nothing in it yet
    cache.append(made, keys_and_values(3, rows=1))
    first = made.layers[0].keys
    assert cache.expand(made, 4) and made.layers[0].keys.shape[0] == 4
    assert made.layers[0].keys.data_ptr() == first.data_ptr()


def test_what_is_held_takes_up_no_more():
    layers = keys_and_values(3)
    held = cache.holding(layers, tiny.make("llama").config)
    for _ in range(2):
        keys, values = held.update(*keys_and_values(2)[1], 1)
        assert keys.shape[2] == values.shape[2] == 5 and torch.equal(keys[:, :, :3], layers[1][0])
    assert cache.length(held) == 3


def test_one_layers_cache_is_found_under_its_index():
    keys, values = keys_and_values(3)[0]
    held = cache.holding_one(keys, values, 4)
    assert held.update(*keys_and_values(2)[0], 4)[0].shape[2] == 5


def test_layers_that_keep_no_keys_and_values_are_told():
    made = DynamicCache(config=tiny.make("llama").config)
    assert all(isinstance(layer, DynamicLayer) for layer in made.layers)
    config = tf.Qwen3NextConfig(num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"])
    layers = DynamicCache(config=config).layers
    assert (cache.layer_count(config) is None) == (not all(isinstance(layer, DynamicLayer) for layer in layers))


def keys_and_values(tokens: int, rows: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(rows, 2, tokens, 8), torch.randn(rows, 2, tokens, 8)) for _ in range(2)]
