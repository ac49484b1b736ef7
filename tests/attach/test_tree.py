"""Tensors that all modules of one adapter use: made once, in the tree, and still one after copying, pickling and casting."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import output


@pytest.fixture
def handle() -> ts.PeftModel:
    config = ts.VeraConfig(r=8, init_weights=False, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    return ts.get_peft_model(tiny.make("llama"), config).eval()


def shared_by(handle: ts.PeftModel) -> set[int]:
    tree = handle.tree("default")
    return {id(adapter.shared) for _, adapter in tree.items()} | {id(tree.shared)}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda handle: pickle.loads(pickle.dumps(handle))], ids=["copied", "pickled"])
def test_a_copy_has_shared_tensors_of_its_own(handle, again):
    inputs = tiny.inputs_for("llama")
    expected, other = output(handle, inputs), again(handle)
    assert len(shared_by(handle)) == len(shared_by(other)) == 1 and shared_by(handle) != shared_by(other)
    other.tree("default").shared.vera_A.zero_()
    assert torch.equal(output(handle, inputs), expected)
    torch.testing.assert_close(output(other, inputs), output(other.base_model, inputs))


def test_shared_tensors_are_cast_and_moved_with_the_handle(handle):
    handle.double()
    assert handle.tree("default").shared.vera_A.dtype == torch.float64 and len(shared_by(handle)) == 1


def test_shared_tensors_are_no_parameters(handle):
    assert {name.rpartition(".")[2] for name, _ in handle.adapters.named_parameters()} == {"vera_lambda_b", "vera_lambda_d"}
