"""Adapters of another vocabulary than the base's."""

from __future__ import annotations

import pytest
import torch

import tunesmith as ts
from tests import tiny
from tests.bad_input import INPUTS, Snapshot, one_error
from tests.parity.oracle import ours_on, output
from tunesmith import AdapterFileError, TargetError

HEADS = {"modules_to_save": ["embed_tokens", "lm_head"]}


def of_size(tokens: int):
    """A tiny Llama whose tokenizer has grown or shrunk."""
    base = tiny.make("llama")
    base.resize_token_embeddings(tokens, mean_resizing=False)
    return base.eval()


@pytest.mark.parametrize(
    "options", [HEADS, {"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["lm_head"]}], ids=str
)
def test_an_adapter_of_more_tokens_names_both_sizes_and_the_call_that_helps(options, tmp_path):
    grown = ours_on(of_size(100), "lora", "CAUSAL_LM", **options)
    grown.save_pretrained(tmp_path)
    base = tiny.make("llama")
    before = Snapshot(base)
    with one_error(AdapterFileError, "vocabulary of 100 tokens and the base has 96", r"base.resize_token_embeddings\(100\)"):
        ts.PeftModel.from_pretrained(base, tmp_path)
    before.check()
    again = ts.PeftModel.from_pretrained(of_size(100), tmp_path)
    torch.testing.assert_close(output(again, INPUTS)[..., :96], output(grown, INPUTS)[..., :96])


def test_an_adapter_on_embeddings_of_fewer_tokens_names_both_sizes(tmp_path):
    ours_on(tiny.make("llama"), "lora", "CAUSAL_LM", target_modules=["embed_tokens"]).save_pretrained(tmp_path)
    with one_error(AdapterFileError, "vocabulary of 96 tokens and the base has 100", r"resize_token_embeddings\(96\)"):
        ts.PeftModel.from_pretrained(of_size(100), tmp_path)


def test_copies_of_fewer_tokens_keep_the_bases_rows_for_the_others_with_one_warning(tmp_path, caplog):
    before = ours_on(tiny.make("llama"), "lora", "CAUSAL_LM", **HEADS)
    before.save_pretrained(tmp_path)
    base = of_size(100)
    handle = ts.PeftModel.from_pretrained(base, tmp_path)
    (record,) = caplog.records
    assert record.getMessage().count("holds 96 tokens, the base has 100") == 2
    assert torch.equal(output(handle, INPUTS)[..., :96], output(before, INPUTS))
    head = handle.tree("default").node("lm_head").at("_copy").module.weight
    assert torch.equal(head[96:], base.lm_head.weight[96:])


def test_a_trained_token_beyond_the_vocabulary_names_its_size(tmp_path):
    ours_on(of_size(100), "lora", "CAUSAL_LM", trainable_token_indices=[5, 99]).save_pretrained(tmp_path)
    with one_error(TargetError, "96 tokens, so token 99 does not exist; resize it first"):
        ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    ts.PeftModel.from_pretrained(of_size(128), tmp_path)
