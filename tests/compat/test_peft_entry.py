"""Clients that ask for peft's classes find them in ours, in both orders of import; what they then read is right."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import tunesmith
from tests import tiny
from tests.handles import lora

peft = pytest.importorskip("peft")


def test_a_handle_is_seen_as_pefts_and_stays_itself():
    handle = lora(tiny.make("llama"), task_type="CAUSAL_LM")
    assert isinstance(handle, (peft.PeftModelForCausalLM)) and isinstance(handle, PreTrainedModel)
    assert isinstance(handle, tunesmith.PeftModel) and not isinstance(handle, peft.PeftModelForSeq2SeqLM)
    assert handle.__class__.__name__ == type(handle).__name__ and handle.__class__.forward is type(handle).forward
    for other in (copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        assert type(other) is type(handle)
        assert torch.equal(other(**tiny.inputs_for("llama")).logits, handle(**tiny.inputs_for("llama")).logits)
    assert not isinstance(tiny.make("llama"), peft.PeftModel)


def test_what_such_clients_read_is_right():
    handle = lora(tiny.make("llama"), task_type="CAUSAL_LM")
    base = handle.bare_base
    assert handle.base_model.model._get_name() == handle.get_base_model()._get_name() == "LlamaForCausalLM"
    inputs = tiny.inputs_for("llama")
    assert torch.equal(handle.base_model.model(**inputs).logits, handle(**inputs).logits)
    assert not torch.equal(base(**inputs).logits, handle(**inputs).logits)
    found, own = peft.get_peft_model_state_dict(handle), handle.get_adapter_state_dict()
    assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)
    with pytest.raises(tunesmith.UsageError, match="load_adapter"):
        peft.set_peft_model_state_dict(handle, found)


def test_a_configuration_is_seen_as_pefts_and_makes_our_handle():
    config = tunesmith.LoraConfig(task_type="CAUSAL_LM", r=4)
    assert isinstance(config, peft.LoraConfig) and not isinstance(config, peft.PrefixTuningConfig)
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert dataclasses.replace(config, r=2).r == 2
    made = peft.get_peft_model(tiny.make("llama"), config)
    assert isinstance(made, tunesmith.PeftModelForCausalLM)
    theirs = peft.get_peft_model(tiny.make("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert type(theirs) is peft.PeftModelForCausalLM and not isinstance(theirs, tunesmith.PeftModel)


@pytest.mark.parametrize(
    "order", ["import peft, tunesmith", "import tunesmith, peft", "from peft import get_peft_model; import tunesmith, peft"]
)
def test_either_is_imported_first(order):
    script = f"""
from tests import tiny
{order}
from peft import get_peft_model
config = tunesmith.LoraConfig(task_type="CAUSAL_LM")
assert isinstance(config, peft.PeftConfig)
handle = globals()["get_peft_model"](tiny.make("llama"), config)
assert isinstance(handle, tunesmith.PeftModel) and isinstance(handle, peft.PeftModel)
print("fine")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120)
    assert "fine" in done.stdout, done.stderr[-2000:]


def test_peft_is_not_imported_by_us():
    script = "import sys, tunesmith; c = tunesmith.LoraConfig(); assert c.__class__ is type(c); print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr[-2000:]


def test_a_clients_forward_on_the_base_acts_for_this_handle_alone():
    base = tiny.make("llama")
    handle, other = lora(base), lora(base, seed=2)
    inputs = tiny.inputs_for("llama")
    plain, others = handle(**inputs).logits, other(**inputs).logits
    root = handle.get_base_model()
    original = root.forward

    def doubled(**given):
        result = original(**given)
        result.logits = result.logits * 2
        return result

    root.forward = doubled
    assert torch.equal(handle(**inputs).logits, plain * 2)
    assert torch.equal(other(**inputs).logits, others) and "forward" not in vars(base)
    del root.forward
    assert torch.equal(handle(**inputs).logits, plain)
