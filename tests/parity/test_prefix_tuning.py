"""Prefix tuning against the reference library, and what it does that the reference does not: padding, checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import CONFIGS, agree, ours_on, output, quiet, read_by_peft, tensors, theirs_on, written_by_peft
from tests.parity.test_files import with_labels
from tests.parity.test_generation import (
    LENGTHS,
    NEW,
    WAYS,
    both,
    decoded_by_hand,
    generated,
    prompt_of,
    real,
    uneven,
)  # fmt: skip
from tunesmith import ConfigError, PrefixTuningConfig

OPTIONS = {
    "keys and values": {},
    "projected": {"prefix_projection": True, "encoder_hidden_size": 12},
    "projected as wide as the keys": {"prefix_projection": True},
}


def bart():
    torch.manual_seed(0)
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=tiny.VOCAB, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


@pytest.mark.each_value_once
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_files_of_every_task_go_both_ways(name, option, tmp_path):
    agree(tiny.make(name), "prefix", tiny.task_of(name), tiny.inputs_for(name), tmp_path, **OPTIONS[option])


def test_files_of_an_encoder_decoder_with_an_odd_number_of_layers_go_both_ways(tmp_path):
    """There the reference deals out the layers' parts in another order, and all of them."""
    agree(bart(), "prefix", "SEQ_2_SEQ_LM", tiny.inputs_for("t5"), tmp_path)


@pytest.mark.parametrize("make", [lambda: tiny.make("t5"), bart], ids=["t5", "bart"])
def test_a_decoders_mask_counts_the_callers_tokens(make, tmp_path):
    ours, inputs = ours_on(make(), "prefix", "SEQ_2_SEQ_LM"), tiny.inputs_for("t5")
    ours.save_pretrained(tmp_path)
    mask = torch.ones_like(inputs["decoder_input_ids"])
    mask[0, 3:] = 0
    padded = {**inputs, "decoder_attention_mask": mask}
    found, expected = output(ours, padded), output(read_by_peft(ours.bare_base, tmp_path), padded)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0, :3], output(ours, inputs)[0, :3], atol=1e-5, rtol=0)


def test_keys_have_the_size_of_grouped_query_attention(tmp_path):
    ours_on(tiny.make("llama"), "prefix", "CAUSAL_LM").save_pretrained(tmp_path)
    assert {key: tuple(t.shape) for key, t in tensors(tmp_path).items()} == {"prompt_embeddings": (4, 2 * 2 * 16)}
    config = ts.PeftConfig.from_pretrained(tmp_path)
    assert (config.token_dim, config.num_attention_heads, config.num_layers) == (16, 2, 2)
    stored = written_by_peft(theirs_on(tiny.make("llama"), "prefix", "CAUSAL_LM"), tmp_path / "theirs")
    theirs = ts.PeftConfig.from_pretrained(stored)
    assert {**theirs.to_dict(), "base_model_name_or_path": None} == {**config.to_dict(), "base_model_name_or_path": None}


def test_zero_weights_start_from_keys_and_values_of_zero(tmp_path):
    base = tiny.make("llama")
    for options in ({}, {"prefix_projection": True}):
        made = [
            get(base, config(task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights="zero", **options)).eval()
            for get, config in ((ts.get_peft_model, CONFIGS["prefix"][0]), (_theirs, CONFIGS["prefix"][1]))
        ]
        results = [output(model, tiny.inputs_for("llama")) for model in made]
        torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def _theirs(base, config):
    import peft

    with quiet():
        return peft.get_peft_model(copy.deepcopy(base), config)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.each_value_once
@pytest.mark.parametrize("option", ["keys and values", "projected"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_gradient_equals_the_references(name, option):
    """An encoder-decoder with an even number of layers trains half of its prefix, here as there."""
    task, base = tiny.task_of(name), tiny.make(name)
    ours, theirs = (make(base, "prefix", task, **OPTIONS[option]) for make in (ours_on, theirs_on))
    reference = dict(theirs.prompt_encoder["default"].named_parameters())
    prompt = ours.tree("default").prompt
    mine = {"embedding.weight": prompt.embedding} if prompt.encoder is None else dict(prompt.encoder.named_parameters())
    assert {key: p.shape for key, p in mine.items()} == {key: p.shape for key, p in reference.items()}
    with torch.no_grad():
        for key, parameter in mine.items():
            parameter.copy_(reference[key])
    for path, head in ours.tree("default").items():
        head.module.load_state_dict(theirs.base_model.get_submodule(path).modules_to_save["default"].state_dict())
    losses = []
    for model in (ours, theirs):
        result = model(**with_labels(name))
        loss = result.loss if getattr(result, "loss", None) is not None else result.last_hidden_state.cos().mean()
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    for key, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, reference[key].grad, atol=1e-5, rtol=0, msg=lambda text, key=key: key + text)
        assert parameter.grad.abs().max() > 1e-5
    assert all(p.grad is None for p in base.parameters())


def test_labels_stay_as_they_are_and_logits_have_the_inputs_length():
    handle, inputs = ours_on(tiny.make("llama"), "prefix", "CAUSAL_LM"), tiny.inputs_for("llama")
    result = handle(**inputs, labels=inputs["input_ids"])
    assert result.logits.shape[:2] == inputs["input_ids"].shape
    own = torch.nn.functional.cross_entropy(result.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(result.loss, own)


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", [way for way in WAYS if way != "without cache"])
@pytest.mark.parametrize("name", tiny.GENERATING)
def test_generation_equals_the_references_token_for_token(name, way, tmp_path):
    ours, theirs = both(name, "prefix", tmp_path)
    made = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        made.append(model.generate(**prompt_of(name), max_new_tokens=NEW, **WAYS[way]))
    assert made[0].tolist() == made[1].tolist()


@pytest.mark.each_value_once
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", tiny.GENERATING)
def test_generation_without_a_cache_makes_the_same_text(name, beams):
    ours = ours_on(tiny.make(name), "prefix", tiny.task_of(name))
    made = [ours.generate(**prompt_of(name), max_new_tokens=NEW, num_beams=beams, use_cache=cache) for cache in (True, False)]
    assert made[0].tolist() == made[1].tolist()


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_generation_equals_choosing_the_best_word_of_a_forward_call_each_time(name):
    ours = ours_on(tiny.make(name), "prefix", "CAUSAL_LM")
    ids = prompt_of(name)["input_ids"]
    made = ours.generate(input_ids=ids, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=None)
    for _ in range(NEW):
        ids = torch.cat([ids, output(ours, {"input_ids": ids})[:, -1:].argmax(-1)], dim=1)
    assert made.tolist() == ids.tolist()


@pytest.mark.parametrize("name", tiny.GENERATING)
def test_max_length_counts_the_users_tokens(name):
    ours = ours_on(tiny.make(name), "prefix", tiny.task_of(name))
    assert ours.generate(**prompt_of(name), max_length=12, min_length=12).shape[1] == 12


@pytest.mark.each_value_once
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [*tiny.CAUSAL, "t5"])
def test_left_padded_batch_generates_each_rows_own_text(name, beams):
    ours = ours_on(tiny.make(name), "prefix", tiny.task_of(name))
    rows, batch = uneven("left")
    way = {"max_new_tokens": NEW, "min_new_tokens": NEW, "num_beams": beams}
    together = ours.generate(**batch, **way)
    for i, row in enumerate(rows):
        alone = ours.generate(input_ids=row, attention_mask=torch.ones_like(row), **way)
        start = (0, 0) if name == "t5" else (max(LENGTHS), row.shape[1])
        assert together[i, start[0] :].tolist() == alone[0, start[1] :].tolist()


@pytest.mark.each_value_once
@pytest.mark.parametrize("with_mask", [True, False], ids=["with mask", "without mask"])
@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_decoding_by_hand_with_a_cache_equals_generate(name, with_mask):
    ours = ours_on(tiny.make(name), "prefix", "CAUSAL_LM")
    text, logits = generated(ours, prompt_of(name))
    torch.testing.assert_close(decoded_by_hand(ours, prompt_of(name), text, with_mask), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_decoding_a_left_padded_batch_by_hand_equals_generate(name):
    ours = ours_on(tiny.make(name), "prefix", "CAUSAL_LM")
    _, batch = uneven("left")
    text, logits = generated(ours, batch)
    torch.testing.assert_close(decoded_by_hand(ours, batch, text), logits, atol=1e-5, rtol=0)


def test_a_sliding_window_moves_over_the_prefix_as_over_tokens(tmp_path):
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
    base = tf.MistralForCausalLM(tf.MistralConfig(**sizes, sliding_window=6)).eval()
    ours = ours_on(base, "prefix", "CAUSAL_LM")
    ours.save_pretrained(tmp_path)
    theirs, inputs = read_by_peft(base, tmp_path), prompt_of("llama")
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs), atol=1e-5, rtol=0)
    assert (output(ours, inputs) - output(base, inputs)).abs().max() > 1e-3
    text, logits = generated(ours, inputs)
    torch.testing.assert_close(decoded_by_hand(ours, inputs, text), logits, atol=1e-5, rtol=0)


# --- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side"),
    [*((name, side) for name in (*tiny.CAUSAL, "t5") for side in ("left", "right")), ("bert-tagger", "right")],
)
def test_logits_of_real_tokens_do_not_depend_on_padding(name, side):
    """Positions are counted from the mask; in the reference they are not, so left padding moves them."""
    ours = ours_on(tiny.make(name), "prefix", tiny.task_of(name))
    rows, batch = uneven(side)
    more = {"decoder_input_ids": torch.tensor([[0, 5, 9, 11]])} if name == "t5" else {}
    together = output(ours, {**batch, **{key: value.expand(len(rows), -1) for key, value in more.items()}})
    for i, row in enumerate(rows):
        own = output(ours, {"input_ids": row, "attention_mask": torch.ones_like(row), **more})
        torch.testing.assert_close(together[i] if name == "t5" else together[i, real(i, side)], own[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "side"), [("llama-classifier", "left"), ("llama-classifier", "right"), ("bert-classifier", "right")]
)
def test_classification_of_a_padded_row_is_that_of_the_row_alone(name, side):
    ours = ours_on(tiny.make(name), "prefix", "SEQ_CLS")
    rows, batch = uneven(side)
    together = output(ours, batch)
    for i, row in enumerate(rows):
        own = output(ours, {"input_ids": row, "attention_mask": torch.ones_like(row)})
        torch.testing.assert_close(together[i], own[0], atol=1e-5, rtol=0)


def test_positions_given_by_the_caller_count_the_callers_tokens():
    ours, ids = ours_on(tiny.make("gpt2"), "prefix", "CAUSAL_LM"), prompt_of("gpt2")["input_ids"]
    expected = output(ours, {"input_ids": ids})
    for more in ({}, {"attention_mask": torch.ones_like(ids)}):
        given = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None], **more}
        torch.testing.assert_close(output(ours, given), expected, atol=1e-6, rtol=0)


# --- 16 bits, bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert-tagger"])
def test_bf16_bases(name):
    base = tiny.make(name)
    handle = ours_on(base.to(torch.bfloat16), "prefix", tiny.task_of(name))
    inputs = tiny.inputs_for(name)
    assert all(p.dtype == torch.float32 for p in handle.tree("default").prompt.parameters())
    found = output(handle, inputs)
    assert found.dtype == torch.bfloat16
    wide = copy.deepcopy(handle).float()
    torch.testing.assert_close(found.float(), output(wide, inputs), atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = output(wide, inputs)
    torch.testing.assert_close(mixed.float(), output(wide, inputs), atol=0.05, rtol=0.05)


BAD = {
    "encoder_hidden_size=0 must be a whole number": {"encoder_hidden_size": 0},
    "init_weights='ones' must be of type": {"init_weights": "ones"},
    "num_virtual_tokens=None must be": {"num_virtual_tokens": None},
    "prefix_projection=3 must be of type": {"prefix_projection": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        PrefixTuningConfig(**{"num_virtual_tokens": 4, "task_type": "CAUSAL_LM", **BAD[message]})


SIZES = {**tiny.SIZES, "max_position_embeddings": 128, "pad_token_id": 0}
SMALL = {"vocab_size": tiny.VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
FALCON = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
OTHERS = {
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=6)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES)),
    "gpt_bigcode": lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**SMALL)),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**SMALL, rotary_dim=4)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon with one key head": lambda: tf.FalconForCausalLM(tf.FalconConfig(**FALCON)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_compute_in_steps_what_they_compute_at_once(name, tmp_path):
    """And what the reference does, which does not know that Falcon's keys may have one head."""
    torch.manual_seed(0)
    base = OTHERS[name]().eval()
    ours, inputs = ours_on(base, "prefix", "CAUSAL_LM"), prompt_of("llama")
    text, logits = generated(ours, inputs)
    torch.testing.assert_close(output(ours, {"input_ids": text})[:, -NEW - 1 : -1].transpose(0, 1), logits, atol=1e-5, rtol=0)
    assert (output(ours, inputs) - output(base, inputs)).abs().max() > 1e-3
    ours.save_pretrained(tmp_path)
    if name != "falcon with one key head":
        theirs = read_by_peft(base, tmp_path)
        torch.testing.assert_close(output(ours, inputs), output(theirs, inputs), atol=1e-5, rtol=0)


def _deepseek():
    return tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **SIZES, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8, n_routed_experts=4,
            n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32,
        )
    )  # fmt: skip


def _distilbert():
    return tf.DistilBertModel(tf.DistilBertConfig(vocab_size=tiny.VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=64))


def _mamba():
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4))


@pytest.mark.parametrize(
    ("make", "task"), [(_distilbert, "FEATURE_EXTRACTION"), (_mamba, "CAUSAL_LM"), (_deepseek, "CAUSAL_LM")]
)
def test_models_without_past_keys_and_values_are_refused_when_the_adapter_is_made(make, task):
    base = make()
    with pytest.raises(ConfigError, match=r"prefix tuning needs .*; use prompt tuning"):
        ts.get_peft_model(base, PrefixTuningConfig(task_type=task, num_virtual_tokens=4))
    assert not any("forward" in module.__dict__ for module in base.modules())


def test_sizes_that_are_not_the_bases_are_refused():
    with pytest.raises(ConfigError, match="token_dim=32, but the keys of LlamaForCausalLM have 16"):
        ts.get_peft_model(tiny.make("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=32))


def test_a_cache_of_fixed_size_is_refused():
    ours = ours_on(tiny.make("llama"), "prefix", "CAUSAL_LM")
    with pytest.raises(ts.UsageError, match="cache that can grow"):
        ours.generate(**prompt_of("llama"), max_new_tokens=3, cache_implementation="static", disable_compile=True)


def test_two_prefixes_at_once_are_refused():
    handle = ours_on(tiny.make("llama"), "prefix", "CAUSAL_LM")
    handle.add_adapter("second", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    handle.set_adapter(["default", "second"])
    for call in (handle, handle.generate):
        with pytest.raises(ts.UsageError, match="only one adapter with virtual tokens"):
            call(**tiny.inputs_for("llama"))


def test_inputs_longer_than_the_positions_left_are_refused():
    with pytest.raises(ts.UsageError, match="66 positions, but the base has 64; truncate the input to 60"):
        ours_on(tiny.make("gpt2"), "prefix", "CAUSAL_LM")(input_ids=torch.full((1, 62), 5))
