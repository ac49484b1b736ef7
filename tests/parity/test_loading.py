"""Files of every method as the reference writes them, with configurations that say more than their tensors need."""

from __future__ import annotations

import peft
import pytest
import torch

import tunesmith as ts
from tests import tiny
from tests.bad_input import INPUTS, edit_config
from tests.parity.oracle import output, quiet, scrambled

QV = {"target_modules": ["q_proj", "v_proj"]}
METHODS = {
    "IA3": (peft.IA3Config, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LoHa": (peft.LoHaConfig, {**QV, "r": 4}),
    "LoKr": (peft.LoKrConfig, {**QV, "r": 4}),
    "VeRA": (peft.VeraConfig, {**QV, "r": 8}),
    "OFT": (peft.OFTConfig, {"target_modules": ["q_proj"], "oft_block_size": 8}),
    "BOFT": (peft.BOFTConfig, {"target_modules": ["q_proj"], "boft_block_size": 4}),
    "HRA": (peft.HRAConfig, {**QV, "r": 4}),
    "LN tuning": (peft.LNTuningConfig, {"target_modules": ["input_layernorm"]}),
    "AdaLoRA": (peft.AdaLoraConfig, {**QV, "init_r": 6, "target_r": 2, "total_step": 10}),
    "LoRA": (peft.LoraConfig, {**QV, "r": 4, "lora_alpha": 32}),
    "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 3}),
    "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": 3}),
    "P-tuning": (peft.PromptEncoderConfig, {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
}
# What is changed, and how many warnings that is worth where the method has such a field.
CHANGES = {
    "targets of other models": (lambda values: {"target_modules": [*values["target_modules"], "c_attn", "o_proj"]}, 1),
    "a later release": (lambda values: {"brand_new_mode": "default", "brand_new_size": 16, "peft_version": "0.40.0"}, 1),
    "another task": (lambda values: {"task_type": "SEQ_2_SEQ_LM"}, 1),
    "no task": (lambda values: {"task_type": None}, 0),
    "an early release": (lambda values: {name: ... for name, value in values.items() if value in (None, False, [], {})}, 0),
    "all layers": (lambda values: {"layers_pattern": "layers", "layers_to_transform": []}, 0),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`{method: (folder, output)}`"""
    found = {}
    for name, (config, options) in METHODS.items():
        with quiet():
            theirs = scrambled(peft.get_peft_model(tiny.make("llama"), config(task_type="CAUSAL_LM", **options))).eval()
            theirs.save_pretrained(str(folder := tmp_path_factory.mktemp(config.__name__)))
            found[name] = folder, output(theirs, INPUTS)
    return found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_file_whose_tensors_fit_loads_exactly(method, change, written, caplog):
    folder, expected = written[method]
    before, (changed, warnings) = (folder / "adapter_config.json").read_text(), CHANGES[change]
    values = ts.PeftConfig.from_pretrained(folder).to_dict()
    edits = changed(values) if change != "targets of other models" or "target_modules" in values else {}
    edits = edits if change != "all layers" or "layers_pattern" in before else {}
    edit_config(folder, **edits)
    try:
        handle = ts.PeftModel.from_pretrained(tiny.make("llama"), folder)
    finally:
        (folder / "adapter_config.json").write_text(before)
    torch.testing.assert_close(output(handle, INPUTS), expected, rtol=0, atol=1e-5)
    assert len(caplog.records) == (warnings if edits else 0), [record.getMessage() for record in caplog.records]


@pytest.mark.each_value_once
@pytest.mark.parametrize("then", METHODS)
@pytest.mark.parametrize("first", METHODS)
def test_an_adapter_of_any_method_takes_the_place_of_one_of_any_other(first, then, written):
    handle = ts.PeftModel.from_pretrained(tiny.make("llama"), written[first][0])
    handle.load_adapter(written[then][0], "default")
    torch.testing.assert_close(output(handle, INPUTS), written[then][1], rtol=0, atol=1e-5)
