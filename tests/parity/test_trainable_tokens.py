"""Trained rows of embeddings, beside LoRA and alone, against the reference library."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as tf

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import CONFIGS, agree, ours_on, output, own_names, read_by_peft, tensors, theirs_on, written_by_peft
from tests.parity.test_files import with_labels
from tunesmith.checkpoint.names import named_tensors

TOKENS = [7, 3, 41]
CONFIGS["tokens"] = (ts.TrainableTokensConfig, peft.TrainableTokensConfig, {"token_indices": TOKENS})
LORA = {"trainable_token_indices": TOKENS}


def inputs_with_tokens(name: str) -> dict[str, torch.Tensor]:
    inputs = tiny.inputs_for(name)
    inputs["input_ids"][:, 1:4] = torch.tensor(TOKENS)
    return inputs


NAMES = [name for name in tiny.MODELS if name != "bert-answers"]


@pytest.mark.parametrize("name", NAMES)
def test_beside_lora_goes_both_ways(name, tmp_path):
    agree(tiny.make(name), "lora", tiny.task_of(name), inputs_with_tokens(name), tmp_path, **LORA)
    assert sum(key.endswith("token_adapter.trainable_tokens_delta") for key in tensors(tmp_path / "ours")) == 1


@pytest.mark.parametrize("name", [*tiny.GENERATING, "bert-features"])
def test_alone_goes_both_ways(name, tmp_path):
    """With a classifier, the reference leaves the new head untrained and out of the file (or fails); ours trains it."""
    agree(tiny.make(name), "tokens", tiny.task_of(name), inputs_with_tokens(name), tmp_path)


OPTIONS = {
    "by name": ("llama", {"trainable_token_indices": {"embed_tokens": [5, 7]}}),
    "positions": ("gpt2", {"trainable_token_indices": {"wpe": [0, 2]}}),
    "two embeddings": ("gpt2", {"trainable_token_indices": {"wte": TOKENS, "wpe": [1]}}),
    "head alone": ("llama", {"trainable_token_indices": {"lm_head": TOKENS}}),
    "both, not tied": ("llama", {"trainable_token_indices": {"lm_head": TOKENS, "embed_tokens": [7, 8]}}),
    "both tied, the same tokens": ("gpt2", {"trainable_token_indices": {"lm_head": TOKENS, "wte": TOKENS}}),
    "both tied, other tokens": ("gpt2", {"trainable_token_indices": {"lm_head": [7, 9], "wte": TOKENS}}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_option_means_the_same_in_both(case, tmp_path):
    name, options = OPTIONS[case]
    agree(tiny.make(name), "lora", tiny.task_of(name), inputs_with_tokens(name), tmp_path, **options)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert-classifier"])
def test_every_gradient_equals_the_references(name, tmp_path):
    base = tiny.make(name)
    theirs = theirs_on(base, "lora", tiny.task_of(name), **LORA)
    ours = ts.PeftModel.from_pretrained(base, written_by_peft(theirs, tmp_path), is_trainable=True).eval()
    batch = with_labels(name)
    batch["input_ids"][:, 1:4] = torch.tensor(TOKENS)
    for model in (ours, theirs):
        model(**batch).loss.backward()
    expected = {key.replace(".modules_to_save", ""): tensor.grad for key, tensor in own_names(theirs).items()}
    found = {key: t.grad for key, _, t in named_tensors(ours.adapters.default, ours.peft_config["default"], base)}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    rows = next(gradient for key, gradient in found.items() if key.endswith("delta"))
    assert (rows.abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("kind", ["lora", "tokens"])
def test_starts_as_the_base_bit_for_bit(kind):
    for name in ("llama", "gpt2", "t5"):
        base, inputs = tiny.make(name), inputs_with_tokens(name)
        expected = output(base, inputs)
        config = ts.LoraConfig(**LORA) if kind == "lora" else ts.TrainableTokensConfig(token_indices=TOKENS)
        torch.testing.assert_close(output(ts.get_peft_model(base, config), inputs), expected, atol=1e-6, rtol=0)
        found = ts.get_peft_model(tiny.make(name).to(torch.bfloat16), config)(**inputs)
        assert tiny.main_output(found).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert-classifier"])
def test_merged_model_is_saved_and_loaded_with_the_same_outputs(name, tmp_path):
    base, inputs = tiny.make(name), inputs_with_tokens(name)
    tied = base.config.tie_word_embeddings and name in ("gpt2", "t5")
    handle = ours_on(base, "lora", tiny.task_of(name), **LORA)
    adapted = output(handle, inputs)
    merged = handle.merge_and_unload(copy=True)
    torch.testing.assert_close(output(merged, inputs), adapted, atol=1e-5, rtol=0)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) if tied else True
    assert merged.config.tie_word_embeddings == base.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(output(type(merged).from_pretrained(tmp_path).eval(), inputs), adapted, atol=1e-5, rtol=0)

    handle.merge_adapter()
    torch.testing.assert_close(output(handle, inputs), adapted, atol=1e-5, rtol=0)
    handle.unmerge_adapter()
    assert torch.equal(output(handle, inputs), adapted)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), tiny.make(name).parameters()))


def test_merges_where_the_tied_head_carries_an_adapter_of_its_own():
    base, inputs = tiny.make("gpt2"), inputs_with_tokens("gpt2")
    handle = ts.get_peft_model(base, ts.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **LORA))
    handle.add_adapter("head", ts.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for order in (["default", "head"], ["head", "default"]):
        handle.set_adapter(order)
        adapted = output(handle.eval(), inputs)
        merged = handle.merge_and_unload(copy=True)
        torch.testing.assert_close(output(merged, inputs), adapted, atol=1e-5, rtol=0)
        assert merged.config.tie_word_embeddings is False


def test_scaled_word_embeddings_scale_rows_and_lora_changes(tmp_path):
    """Gemma multiplies what its table says; so must everything that stands in for rows or changes them."""
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 0}
    base, inputs = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**sizes)).eval(), inputs_with_tokens("llama")
    agree(base, "lora", "CAUSAL_LM", inputs, tmp_path / "tokens", target_modules=["q_proj"], **LORA)
    agree(base, "lora", "CAUSAL_LM", inputs, tmp_path / "embedding", target_modules=["embed_tokens"])
    for options in ({"target_modules": ["q_proj"], **LORA}, {"target_modules": ["embed_tokens"]}):
        handle = ours_on(base, "lora", "CAUSAL_LM", **options)
        merged = handle.merge_and_unload(copy=True)
        torch.testing.assert_close(output(merged, inputs), output(handle, inputs), atol=1e-5, rtol=0)


def test_dora_of_scaled_word_embeddings_merges_as_it_computes():
    """The reference leaves the scale out of DoRA's part of such embeddings, so its merged weights compute something else."""
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 0}
    base, inputs = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**sizes)).eval(), inputs_with_tokens("llama")
    handle = ours_on(base, "lora", "CAUSAL_LM", target_modules=["embed_tokens"], use_dora=True)
    torch.testing.assert_close(output(handle.merge_and_unload(copy=True), inputs), output(handle, inputs), atol=1e-5, rtol=0)


def test_only_the_chosen_rows_change():
    base, inputs = tiny.make("llama"), inputs_with_tokens("llama")
    handle = ours_on(base, "tokens", "CAUSAL_LM")
    merged = handle.merge_and_unload(copy=True)
    changed = (merged.get_input_embeddings().weight != base.get_input_embeddings().weight).any(1)
    assert sorted(changed.nonzero().flatten().tolist()) == sorted(TOKENS)
    inputs["input_ids"][:] = 50
    assert torch.equal(output(handle, inputs), output(base, inputs))


def test_a_second_adapter_and_a_copy_keep_their_rows(tmp_path):
    base, inputs = tiny.make("gpt2"), inputs_with_tokens("gpt2")
    handle = ours_on(base, "lora", "CAUSAL_LM", **LORA)
    expected = output(handle, inputs)
    copied = copy.deepcopy(handle)
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter.zero_()
    assert torch.equal(output(copied, inputs), expected) and not torch.equal(output(handle, inputs), expected)
    copied.save_pretrained(tmp_path)
    handle.load_adapter(tmp_path)
    assert torch.equal(output(handle, inputs), expected)
    other = ours_on(tiny.make("gpt2"), "lora", "CAUSAL_LM", trainable_token_indices=[7, 3, 42])
    other.load_adapter(tmp_path)
    assert torch.equal(output(other, inputs), expected)
    assert torch.equal(output(read_by_peft(base, tmp_path), inputs), output(read_by_peft(base, tmp_path), inputs))


BAD = {
    "negative": ({"trainable_token_indices": [3, -1]}, "-1 is not a token id"),
    "twice": ({"trainable_token_indices": {"embed_tokens": [3, 3]}}, "lists a token twice"),
    "empty by name": ({"trainable_token_indices": {"embed_tokens": []}}, "is empty"),
    "no numbers": ({"trainable_token_indices": ["a"]}, "must be of type"),
}
UNFIT = {
    "beyond": ({"trainable_token_indices": [96]}, "has 96 tokens, so token 96 does not exist; resize it first"),
    "no module": ({"trainable_token_indices": {"embed_token": [3]}}, "did you mean 'embed_tokens'"),
    "no embedding": ({"trainable_token_indices": {"norm": [3]}}, "is a LlamaRMSNorm; name an embedding"),
    "target, too": ({"trainable_token_indices": [3], "target_modules": ["embed_tokens"]}, "cannot be a target"),
    "saved whole, too": ({"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}, "or saved whole"),
}


@pytest.mark.parametrize("case", [*BAD, *UNFIT])
def test_bad_tokens_are_refused_with_the_reason(case):
    fields, message = {**BAD, **UNFIT}[case]
    with pytest.raises(ts.ConfigError if case in BAD else ts.TargetError) as found:
        ts.get_peft_model(tiny.make("llama"), ts.LoraConfig(**fields))
    assert message in str(found.value)


def test_alone_needs_tokens():
    with pytest.raises(ts.ConfigError, match="name at least one token"):
        ts.TrainableTokensConfig()
