"""Modules trained whole beside an adapter: task heads, embeddings of new tokens, output heads, tied or not."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from tests import tiny
from tests.handles import assert_same_state, out, state
from tests.parity.oracle import read_by_peft, tensors
from tunesmith import AdapterFileError, LoraConfig, PeftModel, UsageError, get_peft_model

NEW = 8  # tokens added to the vocabulary


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tiny._llama_config(tie_word_embeddings=True)).eval()


BASES = {"llama": lambda: tiny.make("llama"), "tied llama": tied_llama, "gpt2": lambda: tiny.make("gpt2")}
EMBEDDING = {"llama": "embed_tokens", "tied llama": "embed_tokens", "gpt2": "wte"}
TARGETS = {"llama": "q_proj", "tied llama": "q_proj", "gpt2": "c_attn"}
CASES = [(base, which) for base in BASES for which in ("both", "embedding", "head", "none")]


def resized(name: str) -> nn.Module:
    """The base with new tokens, the same each time."""
    base = BASES[name]()
    torch.manual_seed(4)
    base.resize_token_embeddings(tiny.VOCAB + NEW, mean_resizing=False)
    return base.eval()


def is_tied(base: nn.Module) -> bool:
    return base.get_input_embeddings().weight is base.get_output_embeddings().weight


def new_token_inputs() -> dict[str, torch.Tensor]:
    inputs = tiny.inputs_for("llama")
    inputs["input_ids"][:, 0], inputs["input_ids"][:, -1] = tiny.VOCAB + NEW - 1, tiny.VOCAB + 3
    return inputs


def trained(base: nn.Module, name: str, which: str) -> PeftModel:
    """A handle after three steps of training on inputs with new tokens."""
    wanted = {"both": [EMBEDDING[name], "lm_head"], "embedding": [EMBEDDING[name]], "head": ["lm_head"], "none": None}[which]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=[TARGETS[name]], modules_to_save=wanted, init_lora_weights=False)
    handle, inputs = get_peft_model(base, config).train(), new_token_inputs()
    optimizer = torch.optim.SGD([p for p in handle.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        handle(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle.eval()


@pytest.mark.each_value_once
@pytest.mark.parametrize(("name", "which"), CASES)
def test_new_tokens_are_trained_saved_and_loaded_on_a_base_resized_anew(name, which, tmp_path):
    base = resized(name)
    before, tied = state(base), is_tied(base)
    assert tied == (name != "llama")
    handle, inputs = trained(base, name, which), new_token_inputs()
    expected = out(handle, inputs)
    assert (expected - out(base, inputs)).abs().max() > 1e-3
    assert_same_state(before, state(base))
    assert is_tied(base) == tied
    handle.save_pretrained(tmp_path)
    copies = {"both": 2, "embedding": 1, "head": 1, "none": 0}[which]
    assert sum("lora" not in key for key in tensors(tmp_path)) == copies
    fresh = resized(name)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(out(again, inputs), expected)
    torch.testing.assert_close(out(read_by_peft(resized(name), tmp_path), inputs), expected, rtol=1e-5, atol=1e-5)
    with again.disable_adapter():
        assert torch.equal(out(again, inputs), out(resized(name), inputs))


@pytest.mark.each_value_once
@pytest.mark.parametrize("copied", [False, True], ids=["in place", "into a copy"])
@pytest.mark.parametrize(("name", "which"), CASES)
def test_merged_and_saved_whole_it_is_the_same_model_after_reloading(name, which, copied, tmp_path):
    """Tied weights that no longer hold the same values must be said to be untied, or they reload tied, and wrong."""
    base = resized(name)
    handle, inputs = trained(base, name, which), new_token_inputs()
    expected = out(handle, inputs)
    merged = handle.merge_and_unload(copy=copied).eval()
    torch.testing.assert_close(out(merged, inputs), expected, rtol=1e-5, atol=1e-5)
    still_tied = name != "llama" and which == "none"
    assert is_tied(merged) == still_tied and merged.config.tie_word_embeddings == still_tied
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(out(again, inputs), out(merged, inputs), rtol=1e-6, atol=1e-6)
    if copied:
        assert is_tied(base) == (name != "llama") and base.config.tie_word_embeddings == (name != "llama")
        assert torch.equal(out(handle, inputs), expected)


@pytest.mark.parametrize("name", ["tied llama", "gpt2"])
def test_unmerging_ties_again(name):
    base = resized(name)
    before = state(base)
    handle = trained(base, name, "both")
    handle.merge_adapter()
    assert not is_tied(base) and not base.config.tie_word_embeddings
    handle.unmerge_adapter()
    assert is_tied(base) and base.config.tie_word_embeddings
    assert_same_state(before, state(base))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_one_of_two_tied_modules_merges_into_that_one_alone(target, tmp_path):
    inputs = tiny.inputs_for("llama")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=[target], init_lora_weights=False)
    handle = get_peft_model(tied_llama(), config).eval()
    expected = out(handle, inputs)
    assert (expected - out(handle.bare_base, inputs)).abs().max() > 1e-3
    merged = handle.merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(out(type(merged).from_pretrained(tmp_path).eval(), inputs), expected, rtol=1e-5, atol=1e-5)


def resized_t5() -> nn.Module:
    base = tiny.make("t5")
    torch.manual_seed(4)
    base.resize_token_embeddings(tiny.VOCAB + NEW, mean_resizing=False)
    return base.eval()


@pytest.mark.parametrize("which", [["shared"], ["shared", "lm_head"]], ids="+".join)
def test_t5s_shared_embedding_acts_in_encoder_and_decoder_once_it_is_one_module(which, tmp_path):
    """Resizing makes it one module of three names; in the reference it then acts under the first name only, so nowhere."""
    inputs = {**tiny.inputs_for("t5"), "input_ids": new_token_inputs()["input_ids"]}
    handle = get_peft_model(resized_t5(), LoraConfig(task_type="SEQ_2_SEQ_LM", modules_to_save=which)).eval()
    plain = out(handle, inputs)
    with torch.no_grad():
        handle.tree("default").node("shared")._copy.module.weight.add_(0.5 * torch.randn(tiny.VOCAB + NEW, 32))
    expected = out(handle, inputs)
    assert (expected - plain).abs().max() > 1e-2
    handle.save_pretrained(tmp_path / "adapter")
    assert torch.equal(out(PeftModel.from_pretrained(resized_t5(), tmp_path / "adapter").eval(), inputs), expected)
    torch.testing.assert_close(out(read_by_peft(resized_t5(), tmp_path / "adapter"), inputs), plain, rtol=1e-5, atol=1e-5)
    merged = handle.merge_and_unload().eval()
    torch.testing.assert_close(out(merged, inputs), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(out(again, inputs), expected, rtol=1e-5, atol=1e-5)


def test_t5s_shared_embedding_is_refused_where_nothing_calls_it():
    """As loaded, encoder and decoder hold modules of their own with the same weight; the reference trains nothing there."""
    handle = get_peft_model(tiny.make("t5"), LoraConfig(task_type="SEQ_2_SEQ_LM", modules_to_save=["shared"]))
    with pytest.raises(UsageError, match=r"neither were the modules called(.|\n)*- shared"):
        handle(**tiny.inputs_for("t5"))


def test_a_file_for_another_vocabulary_is_refused_with_both_sizes(tmp_path):
    trained(resized("llama"), "llama", "both").save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"shape \(104, 32\), the base needs \(96, 32\)"):
        PeftModel.from_pretrained(tiny.make("llama"), tmp_path)


def test_resizing_under_trained_embeddings_is_refused_and_otherwise_reaches_the_base():
    handle = trained(resized("llama"), "llama", "both")
    with pytest.raises(UsageError, match=r"carry adapters \(lm_head, model.embed_tokens\); resize first"):
        handle.resize_token_embeddings(200)
    free = get_peft_model(tiny.make("llama"), LoraConfig(task_type="CAUSAL_LM"))
    free.resize_token_embeddings(tiny.VOCAB + NEW)
    assert out(free.eval(), new_token_inputs()).shape[-1] == tiny.VOCAB + NEW
    assert not any(p.requires_grad for p in free.bare_base.parameters())


# --- task heads -----------------------------------------------------------------------------------------------------

CLASSIFIERS = {
    "bert-classifier": "classifier",
    "llama-classifier": "score",
    "bert-tagger": "classifier",
    "bert-answers": "qa_outputs",
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifiers_head_is_trained_saved_and_merged_without_being_named(name, tmp_path):
    base, inputs, head = tiny.make(name), tiny.inputs_for(name), CLASSIFIERS[name]
    before = state(base)
    config = LoraConfig(task_type=tiny.task_of(name), init_lora_weights=False)
    handle = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = out(handle, inputs)
    assert_same_state(before, state(base))
    handle.save_pretrained(tmp_path / "adapter")
    assert {key for key in tensors(tmp_path / "adapter") if "lora" not in key} == {
        f"base_model.model.{head}.{leaf}" for leaf, _ in base.get_submodule(head).named_parameters()
    }
    other_head = tiny.make(name)  # the hub's base has no trained head: whatever stands there must not matter
    nn.init.normal_(other_head.get_submodule(head).weight)
    assert torch.equal(out(PeftModel.from_pretrained(other_head, tmp_path / "adapter").eval(), inputs), expected)
    merged = handle.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(out(again, inputs), expected, rtol=1e-5, atol=1e-5)


def test_each_adapter_has_a_head_of_its_own():
    name = "bert-classifier"
    base, inputs = tiny.make(name), tiny.inputs_for(name)
    handle = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"), "one").eval()
    handle.add_adapter("two", LoraConfig(task_type="SEQ_CLS"))
    with torch.no_grad():
        for shift, adapter in ((1.0, "one"), (2.0, "two")):
            handle.tree(adapter).node("classifier")._copy.module.bias.add_(shift)
    plain = out(base, inputs)
    for shift, adapter in ((1.0, "one"), (2.0, "two")):
        handle.set_adapter(adapter)
        torch.testing.assert_close(out(handle, inputs), plain + shift)
    with handle.disable_adapter():
        assert torch.equal(out(handle, inputs), plain)
