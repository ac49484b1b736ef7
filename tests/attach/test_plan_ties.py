"""`ensure_weight_tying`: one adapter, one private copy or one set of trained rows for every module that holds one weight."""

import logging

import peft
import pytest
import torch
import transformers as tf

from tests import tiny
from tests.handles import assert_same_state, out, state
from tunesmith import LoraConfig, PeftModel, get_peft_model
from tunesmith.errors import TargetError

INPUTS = tiny.inputs_for("llama")


def tied_llama(**fields):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tiny._llama_config(tie_word_embeddings=True, **fields)).eval()


def tied_gemma():
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**sizes, max_position_embeddings=64)).eval()


def tied_bart():
    torch.manual_seed(0)
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 4))}
    widths = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "scale_embedding": True}
    config = tf.BartConfig(vocab_size=tiny.VOCAB, max_position_embeddings=64, **layers, **widths, decoder_start_token_id=2)
    return tf.BartForConditionalGeneration(config).eval()


def nested():
    """A model of two towers whose language model's configuration says that it is tied."""
    torch.manual_seed(0)
    text = {**tiny.SIZES, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}, mm_tokens_per_image=4, image_token_id=90
    )
    return tf.Gemma3ForConditionalGeneration(config).eval()


BASES = {
    "llama": (tied_llama, "embed_tokens", "lm_head"),
    "gpt2": (lambda: tiny.make("gpt2"), "wte", "lm_head"),
    "gemma2": (tied_gemma, "embed_tokens", "lm_head"),
    "t5": (lambda: tiny.make("t5"), "shared", "lm_head"),
    "bart": (tied_bart, "model.shared", "lm_head"),
    "nested": (nested, "embed_tokens", "lm_head"),
}
WAYS = {
    "embedding": lambda words, head: {"target_modules": [words]},
    "head": lambda words, head: {"target_modules": [head]},
    "both": lambda words, head: {"target_modules": [words, head]},
    "copy of the embedding": lambda words, head: {"target_modules": [], "modules_to_save": [words]},
    "copy of the head": lambda words, head: {"target_modules": [], "modules_to_save": [head]},
    "copies": lambda words, head: {"target_modules": [], "modules_to_save": [words, head]},
    "rows": lambda words, head: {"target_modules": [], "trainable_token_indices": {words: [3, 5]}},
}
LINEAR = {"t5": "q", "bart": "q_proj", "gpt2": "c_attn"}


def config_for(name: str, way: str, **fields) -> LoraConfig:
    _, words, head = BASES[name]
    given = {**WAYS[way](words, head), **fields}
    given["target_modules"] = [*given["target_modules"], LINEAR.get(name, "q_proj")]
    return LoraConfig(**given, r=4, init_lora_weights=False, ensure_weight_tying=True)


def inputs_of(name: str):
    return tiny.inputs_for("t5" if name in ("t5", "bart") else "llama")


def filled(handle, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return handle.eval()


def tied_weights(model) -> set[int]:
    named = dict(model.named_parameters(remove_duplicate=False))
    words = model.get_input_embeddings().weight
    return {name for name, value in named.items() if value is words}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BASES)
def test_merged_models_stay_tied_and_reload_to_the_same_numbers(name, way, tmp_path):
    base = BASES[name][0]()
    before, names, inputs = state(base), tied_weights(base), inputs_of(name)
    assert len(names) > 1
    handle = filled(get_peft_model(base, config_for(name, way)))
    expected = out(handle, inputs)
    assert (expected - out(BASES[name][0](), inputs)).abs().max() > 1e-2
    handle.merge_adapter()
    torch.testing.assert_close(out(base, inputs), expected, rtol=1e-4, atol=1e-5)
    assert tied_weights(base) == names
    handle.unmerge_adapter()
    assert_same_state(before, state(base))
    handle.merge_and_unload(copy=True).save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    torch.testing.assert_close(out(again, inputs), expected, rtol=1e-4, atol=1e-5)
    assert tied_weights(again) == names


@pytest.mark.parametrize("way", ["head", "copy of the head"])
@pytest.mark.parametrize("name", BASES)
def test_without_it_merging_unties_and_reloads_to_the_same_numbers(name, way, tmp_path):
    base, inputs = BASES[name][0](), inputs_of(name)
    config = config_for(name, way)
    config.ensure_weight_tying = False
    handle = filled(get_peft_model(base, config))
    expected = out(handle, inputs)
    handle.merge_and_unload().save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    torch.testing.assert_close(out(again, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_tied_weight(way):
    """The one weight gets the gradients of all places in which it acts, and its factors theirs by the chain rule."""
    handle = filled(get_peft_model(tied_llama(), config_for("llama", way)))
    handle(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    plain = handle.merge_and_unload(copy=True)
    plain.requires_grad_(True)
    plain(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    whole = plain.get_input_embeddings().weight.grad
    node = handle.tree("default").node("model.embed_tokens")
    if "copy" in way or "copies" in way:
        found, expected = node.at("_copy").module.weight.grad, whole
    elif way == "rows":
        found, expected = node.at("_tokens").trainable_tokens_delta.grad, whole[[3, 5]]
    else:
        lora = node.own
        found, expected = lora.lora_A.grad, lora.scale * (whole @ lora.lora_B).T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert not list(handle.tree("default").node("lm_head").parameters())


@pytest.mark.parametrize("way", WAYS)
def test_files_go_to_the_reference_and_back(way, tmp_path):
    handle = filled(get_peft_model(tied_llama(), config_for("llama", way)))
    handle.peft_config["default"].task_type = "CAUSAL_LM"
    expected = out(handle, INPUTS)
    handle.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(out(PeftModel.from_pretrained(tied_llama(), tmp_path / "ours").eval(), INPUTS), expected)
    theirs = peft.PeftModel.from_pretrained(tied_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(out(theirs, INPUTS), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(tied_llama(), tmp_path / "theirs").eval()
    torch.testing.assert_close(out(again, INPUTS), expected, rtol=1e-4, atol=1e-5)


def test_dropout_and_several_adapters_of_a_tied_weight():
    base = tied_llama()
    handle = filled(get_peft_model(base, config_for("llama", "both", lora_dropout=0.5)))
    handle.add_adapter("second", config_for("llama", "head"))
    handle.set_adapter(["default", "second"])
    filled(handle, 6)
    expected = out(handle, INPUTS)
    handle.merge_adapter()
    torch.testing.assert_close(out(base, INPUTS), expected, rtol=1e-4, atol=1e-5)
    handle.unmerge_adapter()
    handle.set_adapter("default")
    rows = {**INPUTS, "adapter_names": ["second", "__base__"]}
    alone = out(base, INPUTS)
    mixed = out(handle, rows)
    torch.testing.assert_close(mixed[1], alone[1])
    handle.train()
    torch.manual_seed(0)
    first = handle(**INPUTS).logits
    assert (first - handle(**INPUTS).logits).abs().max() > 1e-3


def test_what_cannot_stay_tied_is_refused():
    with pytest.raises(TargetError, match="use_dora is different"):
        get_peft_model(tied_llama(), config_for("llama", "both", use_dora=True))
    with pytest.raises(TargetError, match="trained whole and lm_head is a target"):
        get_peft_model(tied_llama(), config_for("llama", "head", modules_to_save=["embed_tokens"]))
    with pytest.raises(TargetError, match="name the same tokens"):
        tokens = {"embed_tokens": [3], "lm_head": [4]}
        get_peft_model(tied_llama(), config_for("llama", "rows", trainable_token_indices=tokens))


def test_where_it_has_no_effect_it_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        get_peft_model(tiny.make("llama"), config_for("llama", "both"))
    assert "no module holds the weight of the input embeddings" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        get_peft_model(tied_llama(), LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True))
    assert "neither model.embed_tokens nor lm_head is trained" in caplog.text
