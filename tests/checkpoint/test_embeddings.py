"""Embeddings in adapter files: written where the base alone would not give them back, and private values when they are read."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import tunesmith as ts
from tests import tiny
from tests.bad_input import one_error
from tests.handles import assert_same_state, lora, out, state
from tests.parity.oracle import quiet, tensors
from tunesmith import AdapterFileError, UsageError

INPUT, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
NEW_TOKENS = {"input_ids": torch.tensor([[97, 5, 101, 7]])}
VOCAB = tiny.VOCAB + 8


def resized(seed: int = 5, tied: bool = False) -> torch.nn.Module:
    """A base with new tokens whose rows are drawn from `seed`; everything else is the same for all seeds."""
    base = tiny.make("llama")
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    torch.manual_seed(seed)
    base.resize_token_embeddings(VOCAB, mean_resizing=False)
    return base.eval()


def of_theirs(base: torch.nn.Module, **fields) -> peft.PeftModel:
    torch.manual_seed(1)
    with quiet():
        return peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **fields)).eval()


TARGETS = {
    "layers": ["q_proj"],
    "embedding": ["q_proj", "embed_tokens"],
    "head": ["q_proj", "lm_head"],
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_a_resized_vocabulary_comes_back_on_a_base_with_other_new_rows(targets, tied, tmp_path):
    handle = lora(resized(tied=tied), target_modules=TARGETS[targets])
    expected = out(handle, NEW_TOKENS)
    handle.save_pretrained(tmp_path, save_embedding_layers=True)
    base = resized(6, tied)
    before = state(base)
    again = ts.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    assert torch.equal(out(again, NEW_TOKENS), expected)
    assert_same_state(before, state(base))
    assert not torch.equal(out(base, NEW_TOKENS), out(handle.bare_base, NEW_TOKENS))
    with quiet():
        theirs = peft.PeftModel.from_pretrained(resized(6, tied), tmp_path).eval()
    torch.testing.assert_close(out(theirs, NEW_TOKENS), expected, atol=1e-5, rtol=1e-5)

    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    again.save_pretrained(tmp_path / "again")  # its own values, whatever "auto" finds out about the base
    once_more = ts.PeftModel.from_pretrained(resized(7, tied), tmp_path / "again").eval()
    assert torch.equal(out(once_more, NEW_TOKENS), expected)
    merged = copy.deepcopy(again).merge_and_unload()
    torch.testing.assert_close(out(merged, NEW_TOKENS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", [{"target_modules": ["q_proj"]}, {"target_modules": ["embed_tokens"]},
                                    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
                                    {"target_modules": ["q_proj"], "trainable_token_indices": [3, 97]}],
                         ids=["layers", "embedding", "copied head", "rows"])  # fmt: skip
def test_files_of_peft_with_embeddings_are_read(fields, tied, tmp_path):
    if tied and "modules_to_save" in fields:
        pytest.skip("peft unties the head")
    theirs = of_theirs(resized(tied=tied), **fields)
    with quiet():
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
        untied_head_is_left_out = not tied and fields["target_modules"] == ["embed_tokens"]
        reader = peft.PeftModel.from_pretrained(resized(6, tied), tmp_path).eval()
    again = ts.PeftModel.from_pretrained(resized(6, tied), tmp_path).eval()
    torch.testing.assert_close(out(again, NEW_TOKENS), out(reader, NEW_TOKENS), atol=1e-5, rtol=1e-5)
    if not untied_head_is_left_out:
        torch.testing.assert_close(out(again, NEW_TOKENS), out(theirs, NEW_TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_file_holds_what_pefts_holds(tied, tmp_path):
    lora(resized(tied=tied), target_modules=["q_proj"]).save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    with quiet():
        of_theirs(resized(tied=tied), target_modules=["q_proj"]).save_pretrained(
            tmp_path / "theirs", save_embedding_layers=True
        )
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() >= {f"{INPUT}.weight", f"{HEAD}.weight"}
    assert torch.equal(ours[f"{INPUT}.weight"], theirs[f"{INPUT}.weight"])


def test_auto_writes_embeddings_of_a_resized_vocabulary_and_no_others(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "base")
    for rows, names in ((tiny.VOCAB, set()), (VOCAB, {f"{INPUT}.weight", f"{HEAD}.weight"})):
        base = tiny.make("llama")
        base.name_or_path = str(tmp_path / "base")
        base.resize_token_embeddings(rows, mean_resizing=False)
        lora(base, target_modules=["q_proj"]).save_pretrained(tmp_path / str(rows))
        assert {name for name in tensors(tmp_path / str(rows)) if "lora" not in name} == names
        lora(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "none", save_embedding_layers=False)
        assert not [name for name in tensors(tmp_path / "none") if "lora" not in name]


def test_auto_writes_what_lies_under_a_targeted_embedding_even_while_it_is_merged(tmp_path):
    handle = lora(tiny.make("llama"), target_modules=["embed_tokens"])
    own = handle.bare_base.model.embed_tokens.weight.clone()
    handle.merge_adapter()
    handle.save_pretrained(tmp_path)
    assert torch.equal(tensors(tmp_path)[f"{INPUT}.base_layer.weight"], own)
    again = ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    assert not [name for name in again.adapters.state_dict() if "_stored" in name]  # the base has these values


def test_a_handle_takes_the_embeddings_of_a_file_in_place_of_its_own_and_back(tmp_path):
    handle = lora(resized(), target_modules=["q_proj"])
    expected = out(handle, NEW_TOKENS)
    handle.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    handle.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    other = lora(resized(6), seed=2, target_modules=["q_proj"])
    other.load_adapter(tmp_path / "whole")
    assert torch.equal(out(other, NEW_TOKENS), expected)
    other.load_adapter(tmp_path / "plain")
    assert not torch.equal(out(other, NEW_TOKENS), expected)
    assert not [name for name in other.adapters.state_dict() if "_stored" in name]


def test_embeddings_that_are_not_there_are_not_asked_for_in_vain(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with one_error(UsageError, "Sequential names no embeddings"):
        lora(net, target_modules=["0"]).save_pretrained(tmp_path / "out", save_embedding_layers=True)
    with one_error(ts.ConfigError, "save_embedding_layers='yes' must be"):
        lora(tiny.make("llama")).save_pretrained(tmp_path / "out", save_embedding_layers="yes")
    assert not (tmp_path / "out").exists()


def test_embeddings_of_another_size_are_one_error(tmp_path):
    lora(resized(), target_modules=["q_proj"]).save_pretrained(tmp_path, save_embedding_layers=True)
    with one_error(AdapterFileError, rf"embed_tokens.weight. has the shape \({VOCAB}, 32\), the base needs \({tiny.VOCAB}, 32"):
        ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)


def test_combinations_take_the_one_members_embeddings_over(tmp_path):
    lora(resized(), target_modules=["q_proj"]).save_pretrained(tmp_path, save_embedding_layers=True)
    handle = ts.PeftModel.from_pretrained(resized(6), tmp_path).eval()
    expected = out(handle, NEW_TOKENS)
    handle.add_weighted_adapter(["default"], [1.0], "new", combination_type="cat")
    handle.set_adapter("new")
    torch.testing.assert_close(out(handle, NEW_TOKENS), expected, atol=1e-5, rtol=1e-5)
    with one_error(UsageError, "each have modules or biases of their own"):
        handle.add_weighted_adapter(["default", "new"], [1.0, 1.0], "both")


def test_a_copied_handle_has_embeddings_of_its_own(tmp_path):
    lora(resized(tied=True), target_modules=["q_proj"]).save_pretrained(tmp_path, save_embedding_layers=True)
    handle = ts.PeftModel.from_pretrained(resized(6, tied=True), tmp_path).eval()
    expected = out(handle, NEW_TOKENS)
    other = copy.deepcopy(handle)
    with torch.no_grad():
        next(value for name, value in handle.adapters.named_buffers() if "_stored" in name).zero_()
    assert torch.equal(out(other, NEW_TOKENS), expected)
