"""Trees of adapters: tensors that all modules of one adapter share, modules and adapters with awkward names."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.bad_input import INPUTS, Snapshot, one_error
from tests.parity.oracle import output
from tunesmith import AdapterNameError, LoraConfig
from tunesmith.runtime.site import site_of

# --- tensors that are shared: made once, and still one after copying, pickling and casting ----------------------------


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
    torch.testing.assert_close(output(other, inputs), output(other.bare_base, inputs))


def test_shared_tensors_are_cast_and_moved_with_the_handle(handle):
    handle.double()
    assert handle.tree("default").shared.vera_A.dtype == torch.float64 and len(shared_by(handle)) == 1


def test_shared_tensors_are_not_parameters(handle):
    assert {name.rpartition(".")[2] for name, _ in handle.adapters.named_parameters()} == {"vera_lambda_b", "vera_lambda_d"}


# --- names of modules -------------------------------------------------------------------------------------------------


def test_modules_may_have_the_names_of_python_methods(tmp_path):
    """Trees mirror the base's names, whatever they are."""

    def make():
        torch.manual_seed(0)
        base = nn.Module()
        for name in ("items", "add", "prompt", "node", "keys"):
            setattr(base, name, nn.Linear(4, 4))
        base.forward = None
        del base.forward
        return base

    base = make()
    handle = ts.get_peft_model(
        base, LoraConfig(target_modules=["items", "add", "prompt", "node", "keys"], init_lora_weights=False)
    )
    handle.save_pretrained(tmp_path)
    again = ts.PeftModel.from_pretrained(make(), tmp_path)
    assert handle.get_nb_trainable_parameters()[0] == 5 * 64
    for mine, loaded in zip(handle.adapters.parameters(), again.adapters.parameters()):
        assert torch.equal(mine, loaded)


# --- names of adapters -------------------------------------------------------------------------------------------------

UNSAFE = [
    "",
    "../x",
    "a/b",
    "a\\b",
    "..",
    ".",
    ".hidden",
    "a.b",
    "x\n",
    "a\n",
    "a\0b",
    "-",
    "-x",
    " x",
    " a",
    "x" * 129,
    "x" * 200,
    "~",
    "C:x",
    "*",
    None,
    3,
]
RESERVED = ["keys", "items", "values", "pop", "training", "forward", "parameters", "_modules", "to"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_adapter_name_is_refused(name, llama):
    before = Snapshot(llama)
    with one_error(AdapterNameError, "is not usable", "use letters, digits"):
        ts.get_peft_model(llama, LoraConfig(), adapter_name=name)
    before.check()
    assert not any(site_of(module) for module in llama.modules())


@pytest.mark.parametrize("name", RESERVED)
def test_adapter_name_that_pytorch_uses(name, llama):
    before = Snapshot(llama)
    with one_error(AdapterNameError, f'"{name}" is reserved by PyTorch', "choose another"):
        ts.get_peft_model(llama, LoraConfig(), adapter_name=name)
    before.check()


@pytest.mark.parametrize("name", ["lora", "lora_A", "base_model", "adapters", "über 2", "a-b_c 3", "0", "_x", "x" * 128])
def test_usable_adapter_name_survives_saving_and_loading(name, llama, tmp_path):
    """Also names like parts of tensor names, which the reference reloads untrained."""
    handle = ts.get_peft_model(llama, LoraConfig(r=2, init_lora_weights=False), adapter_name=name).eval()
    handle.save_pretrained(tmp_path)
    again = ts.PeftModel.from_pretrained(llama, tmp_path / name, adapter_name=name).eval()
    assert torch.equal(output(again, INPUTS), output(handle, INPUTS))
    assert not torch.equal(output(again, INPUTS), output(llama, INPUTS))
