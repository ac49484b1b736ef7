"""Virtual tokens in every mode of generation: the tokens of greedy decoding that recomputes everything, or one clear error."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from transformers import DynamicCache, StaticCache

from tests import tiny
from tests.handles import prefixed, prompted
from tunesmith import ConfigError, UsageError
from tunesmith.runtime import cache

NEW = 8
CROPS = cache.crops_from_the_end()
SIZES = {**tiny.SIZES, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": tf.LlamaConfig(**SIZES, num_key_value_heads=2),
    "gemma3": tf.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=8),
    "gpt2": tf.GPT2Config(
        vocab_size=tiny.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, eos_token_id=2
    ),
    "falcon_h1": tf.FalconH1Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
}
TEXT = torch.randint(3, tiny.VOCAB, (2, 10), generator=torch.Generator().manual_seed(4))
KINDS = {"prompt": prompted, "prefix": prefixed}


def lively(config, seed: int = 0):
    """A model whose next token depends on what came before."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def handle_of(name: str, kind: str):
    handle = KINDS[kind](lively(MODELS[name]), tokens=5).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in handle.adapters.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return handle


def logits_by_hand(handle, text: torch.Tensor) -> torch.Tensor:
    """Of the last token: everything computed anew, with the virtual tokens' embeddings, or keys and values, put in front."""
    base, prompt = handle.bare_base, handle.tree("default").prompt
    with torch.no_grad():
        if not prompt.in_cache:
            embeds = torch.cat([prompt().expand(len(text), -1, -1), base.get_input_embeddings()(text)], dim=1)
            return base(inputs_embeds=embeds, use_cache=False).logits[:, -1]
        held = DynamicCache(config=base.config)
        for layer in range(base.config.num_hidden_layers):
            keys, values = prompt(layer)
            held.update(keys.expand(len(text), -1, -1, -1), values.expand(len(text), -1, -1, -1), layer)
        return base(input_ids=text, use_cache=True, **{cache.cache_name(base): held}).logits[:, -1]


def decoded_by_hand(handle, text: torch.Tensor, new: int = NEW) -> list[list[int]]:
    for _ in range(new):
        text = torch.cat([text, logits_by_hand(handle, text).argmax(-1, keepdim=True)], dim=1)
    return text.tolist()


def generated(handle, text: torch.Tensor, **options) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1, **options}
    return handle.generate(input_ids=text, **options).tolist()


def draft():
    return lively(tf.LlamaConfig(**{**SIZES, "num_hidden_layers": 1}), seed=5)


def by_calling(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """A decoding function of a user's own, which keeps no cache."""
    while not stopping_criteria(input_ids, None).all():
        input_ids = torch.cat([input_ids, model(input_ids=input_ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return input_ids


# name -> (options, by the handle that generates; which kinds of virtual tokens are refused)
NONE, BOTH, PREFIX = frozenset(), frozenset(KINDS), frozenset({"prefix"})
OLD = NONE if CROPS else BOTH
MODES = {
    "plain": (lambda handle: {}, NONE),
    "without cache": (lambda handle: {"use_cache": False}, NONE),
    "given cache": (lambda handle: {cache.cache_name(handle.bare_base): DynamicCache(config=handle.config)}, NONE),
    "static": (lambda handle: {"cache_implementation": "static"}, PREFIX),
    "given static": (lambda handle: {"past_key_values": StaticCache(config=handle.config, max_cache_len=40)}, PREFIX),
    "hybrid": (lambda handle: {"cache_implementation": "hybrid"}, NONE),
    "paged": (lambda handle: {"cache_implementation": "paged"}, BOTH),
    "draft": (lambda handle: {"assistant_model": draft()}, OLD),
    "own base drafts": (lambda handle: {"assistant_model": handle.bare_base}, OLD),
    "own handle drafts": (lambda handle: {"assistant_model": handle}, OLD),
    "handle drafts": (lambda handle: {"assistant_model": prompted(draft(), tokens=2)}, OLD),
    "early exit": (lambda handle: {"assistant_early_exit": 1}, OLD | PREFIX),
    "lookup": (lambda handle: {"prompt_lookup_num_tokens": 3}, OLD),
    "chunks of 1": (lambda handle: {"prefill_chunk_size": 1}, NONE),
    "chunks of 4": (lambda handle: {"prefill_chunk_size": 4}, NONE),
    "static chunks": (lambda handle: {"prefill_chunk_size": 4, "cache_implementation": "static"}, BOTH),
    "positions": (lambda handle: {"position_ids": torch.arange(10)[None]}, NONE),
    "own function": (lambda handle: {"custom_generate": by_calling}, NONE),
    "one beam": (lambda handle: {"num_beams": 1, "length_penalty": 1.0}, NONE),
    "contrastive": (lambda handle: {"penalty_alpha": 0.6, "top_k": 4}, BOTH),
    "in its configuration": (lambda handle: {"generation_config": tf.GenerationConfig(prefill_chunk_size=3)}, NONE),
}


@pytest.mark.each_value_once
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_every_mode_gives_the_tokens_of_decoding_by_hand_or_is_refused(name, mode, kind):
    handle, (options, refused) = handle_of(name, kind), MODES[mode]
    text, settings = TEXT[:1], dict(handle.config.to_dict())
    if kind in refused:
        with pytest.raises(UsageError, match=r"generate with virtual tokens is not exact with"):
            generated(handle, text, **options(handle))
    else:
        assert generated(handle, text, **options(handle)) == decoded_by_hand(handle, text)
    assert handle.config.to_dict() == settings


@pytest.mark.parametrize("way", [{}, {"prefill_chunk_size": 6}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_left_padded_rows_are_decoded_as_they_are_alone(name, way):
    handle, text = handle_of(name, "prompt"), TEXT.clone()
    mask = torch.ones_like(text)
    mask[0, :4] = text[0, :4] = 0
    made = generated(handle, text, attention_mask=mask, **way)
    assert made[0][4:] == decoded_by_hand(handle, text[:1, 4:])[0] and made[1] == decoded_by_hand(handle, text[1:])[0]


def test_a_row_of_padding_alone_in_the_first_chunk_is_refused():
    handle, text = handle_of("llama", "prompt"), TEXT.clone()
    mask = torch.ones_like(text)
    mask[0, :4] = text[0, :4] = 0
    with pytest.raises(UsageError, match=r"first tokens of a row were all padding.*larger prefill_chunk_size"):
        generated(handle, text, attention_mask=mask, prefill_chunk_size=3)


def test_a_prefix_before_padding_is_refused_where_a_window_counts_it():
    handle, mask = handle_of("gemma3", "prefix"), torch.ones_like(TEXT)
    mask[0, :4] = 0
    with pytest.raises(UsageError, match=r"before left padding.*among the 8 columns.*prompt tuning"):
        generated(handle, TEXT, attention_mask=mask)


@pytest.mark.parametrize("given", ["whole text", "whole text without mask", "new tokens"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_second_turn_continues_the_first_ones_cache(name, kind, given):
    handle = handle_of(name, kind)
    key = cache.cache_name(handle.bare_base)
    way = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": -1, "return_dict_in_generate": True}
    first = handle.generate(TEXT[:, :6], **way)
    text, mask, seen = torch.cat([first.sequences, TEXT[:, 6:]], 1), {}, first.sequences.shape[1] - 1
    if given != "whole text without mask":
        mask = {"attention_mask": torch.ones_like(text)}
    start = seen if given == "new tokens" else 0
    made = generated(handle, text[:, start:], **mask, **{key: first[key]})
    assert made == [row[start:] for row in decoded_by_hand(handle, text)]


@pytest.mark.parametrize("extra", ["nothing", "mask", "positions", "mask and positions", "cache_position"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon_h1"])
def test_a_loop_by_hand_counts_the_callers_tokens(name, kind, extra):
    if (name, kind) == ("falcon_h1", "prefix"):
        with pytest.raises(ConfigError, match="keys and values in every layer"):
            handle_of(name, kind)
        return
    handle, seen, found = handle_of(name, kind), 0, {}
    key = cache.cache_name(handle.bare_base)
    for step in (8, 1, 1):
        more = {"attention_mask": torch.ones_like(TEXT[:, : seen + step])} if "mask" in extra else {}
        if "positions" in extra:
            more["position_ids"] = torch.arange(seen, seen + step)[None]
        if extra == "cache_position":
            more["cache_position"] = torch.arange(seen, seen + step)
        with torch.no_grad():
            result = handle(input_ids=TEXT[:, seen : seen + step], use_cache=True, **more, **found)
        found, seen = {key: result[key]}, seen + step
    torch.testing.assert_close(result.logits[:, -1], logits_by_hand(handle, TEXT), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_another_length_than_cache_and_input_is_refused(kind):
    handle = handle_of("llama", kind)
    key = cache.cache_name(handle.bare_base)
    first = handle(input_ids=TEXT[:, :6], use_cache=True)
    with pytest.raises(UsageError, match=r"1 columns, but cache and input hold 7 tokens and 5 virtual ones"):
        handle(input_ids=TEXT[:, 6:7], attention_mask=torch.ones(2, 1), **{key: first[key]})


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_models_that_read_states_or_ids_alone_get_virtual_tokens_too(name):
    handle = handle_of(name, "prompt")
    assert generated(handle, TEXT) == decoded_by_hand(handle, TEXT)
    assert generated(handle, TEXT, use_cache=False) == decoded_by_hand(handle, TEXT)


def test_guidance_weighs_two_texts_behind_the_same_virtual_tokens():
    handle, text = handle_of("llama", "prompt"), TEXT[:1]
    for _ in range(4):
        with_text, without = (logits_by_hand(handle, t).log_softmax(-1) for t in (text, text[:, 9:]))
        text = torch.cat([text, (without + 1.5 * (with_text - without)).argmax(-1, keepdim=True)], dim=1)
    assert generated(handle, TEXT[:1], guidance_scale=1.5, max_new_tokens=4) == text.tolist()


def test_the_base_alone_is_as_it_was():
    handle = handle_of("llama", "prompt")
    base, before = handle.bare_base, lively(MODELS["llama"])
    generated(handle, TEXT)
    assert generated(base, TEXT) == generated(before, TEXT)
    handle.unload()
    assert "forward" not in vars(base)


def test_continuous_batching_is_refused():
    handle = handle_of("llama", "prompt")
    with pytest.raises(UsageError, match="paged cache; use generate"):
        handle.generate_batch(inputs=TEXT.tolist())
