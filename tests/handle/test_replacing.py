"""An adapter loaded onto a name in use: what it computes, and what an optimizer keeps."""

from __future__ import annotations

import pytest
import torch

import tunesmith as ts
from tests import tiny
from tests.bad_input import INPUTS, Snapshot, edit_config, edit_tensors, one_error
from tests.parity.oracle import ours_on, output
from tunesmith import AdapterFileError

# Kind of adapter, and its options; the handle has one of them, the file another.
KINDS = {
    "rank 4": ("lora", {}),
    "rank 2": ("lora", {"r": 2}),
    "alpha 64": ("lora", {"lora_alpha": 64}),
    "rslora": ("lora", {"use_rslora": True}),
    "dora": ("lora", {"use_dora": True}),
    "rank_pattern": ("lora", {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}}),
    "other targets": ("lora", {"target_modules": ["o_proj", "down_proj"]}),
    "a whole module": ("lora", {"modules_to_save": ["lm_head"]}),
    "biases": ("lora", {"lora_bias": True}),
    "virtual tokens": ("prompt", {}),
}


@pytest.mark.parametrize("then", KINDS)
@pytest.mark.parametrize("first", ["rank 4", "dora", "virtual tokens"])
def test_the_one_that_is_loaded_acts_as_on_a_fresh_base_and_the_base_is_untouched(first, then, llama, tmp_path):
    for name, (kind, options) in KINDS.items():
        if name in (first, then):
            ours_on(tiny.make("llama"), kind, "CAUSAL_LM", **options).save_pretrained(tmp_path / name)
    expected = output(ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / then), INPUTS)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    handle = ts.PeftModel.from_pretrained(llama, tmp_path / first)
    handle.load_adapter(tmp_path / then, "default")
    assert torch.equal(output(handle, INPUTS), expected)
    assert handle.active_adapters == ["default"] == list(handle.peft_config)
    assert not any(p.requires_grad for p in handle.parameters())
    handle.save_pretrained(tmp_path / "again")
    assert torch.equal(output(ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "again"), INPUTS), expected)
    handle.load_adapter(tmp_path / first, "default")
    assert torch.equal(
        output(handle, INPUTS), output(ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / first), INPUTS)
    )
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_where_values_alone_differ_every_object_stays(llama, saved, caplog):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    tree, parameters = handle.tree("default"), list(handle.tree("default").parameters())
    handle.load_adapter(saved, "default")
    assert handle.tree("default") is tree
    assert all(a is b for a, b in zip(tree.parameters(), parameters)) and all(p.requires_grad for p in parameters)
    assert not caplog.records


def test_where_the_strength_differs_an_optimizer_goes_on_with_its_parameters(llama, saved, caplog):
    edit_config(saved, lora_alpha=64)
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    parameters = list(handle.tree("default").parameters())
    handle.load_adapter(saved, "default", is_trainable=True)
    assert all(a is b for a, b in zip(handle.tree("default").parameters(), parameters))
    assert all(p.requires_grad for p in parameters) and not caplog.records


def test_where_the_rank_differs_while_it_trains_a_warning_says_that_the_optimizer_must_be_made_anew(llama, saved, caplog):
    handle = ours_on(llama, "lora", "CAUSAL_LM", r=2)
    handle.load_adapter(saved, "default")
    assert all(p.requires_grad for p in handle.tree("default").parameters())
    (record,) = caplog.records
    assert "make its optimizer anew" in record.getMessage()


def test_a_frozen_one_trains_where_the_call_says_so(llama, saved):
    handle = ts.PeftModel.from_pretrained(llama, saved)
    handle.load_adapter(saved, "default", is_trainable=True)
    assert all(p.requires_grad for p in handle.tree("default").parameters())
    handle.set_adapter("default")
    assert all(p.requires_grad for p in handle.tree("default").parameters())


def test_one_that_is_not_active_is_replaced_where_it_is(llama, saved, tmp_path):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    handle.load_adapter(saved, "second", is_trainable=True)
    adapted = output(handle, INPUTS)
    ours_on(tiny.make("llama"), "lora", "CAUSAL_LM", r=2).save_pretrained(tmp_path / "other")
    handle.load_adapter(tmp_path / "other", "second", is_trainable=True)
    assert torch.equal(output(handle, INPUTS), adapted)
    assert not any(p.requires_grad for p in handle.tree("second").parameters())
    handle.set_adapter("second")
    assert all(p.requires_grad for p in handle.tree("second").parameters())


def test_a_swap_that_fails_leaves_the_adapter_as_it_was(llama, tmp_path):
    ours_on(tiny.make("llama"), "lora", "CAUSAL_LM", r=2, use_dora=True).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda v: v.pop(next(key for key in v if "lora_B" in key)))
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    before, adapted, tree = Snapshot(llama), output(handle, INPUTS), handle.tree("default")
    with one_error(AdapterFileError, "is missing"):
        handle.load_adapter(tmp_path, "default")
    before.check()
    assert handle.tree("default") is tree and torch.equal(output(handle, INPUTS), adapted)
