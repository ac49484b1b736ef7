"""BitFit: private copies of the base's own biases."""

from __future__ import annotations

import json

import pytest
import torch

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import output, tensors


def biased(name: str, **options) -> ts.PeftModel:
    """A BitFit handle whose every bias is random."""
    handle = ts.get_peft_model(tiny.make(name), ts.BitFitConfig(task_type=tiny.task_of(name), **options)).eval()
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return handle


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "bert-features", "bert-classifier"])
def test_bitfit_trains_every_bias_and_nothing_else(name):
    base = tiny.make(name)
    handle = ts.get_peft_model(base, ts.BitFitConfig(task_type=tiny.task_of(name)))
    biases = {path: p for path, p in base.named_parameters() if path.endswith(".bias") and not path.startswith("classifier")}
    head = sum(p.numel() for path, p in base.named_parameters() if path.startswith("classifier"))
    assert biases and handle.get_nb_trainable_parameters()[0] == sum(p.numel() for p in biases.values()) + head


def test_bitfit_of_chosen_modules():
    handle = biased("gpt2", target_modules=["c_attn", "ln_1"], layers_to_transform=1)
    assert [path for path, _ in handle.tree("default").items()] == ["transformer.h.1.ln_1", "transformer.h.1.attn.c_attn"]


def test_bitfit_file_holds_the_parameters_own_paths(tmp_path):
    handle = biased("gpt2", target_modules=["attn.c_attn", "ln_f"])
    handle.save_pretrained(tmp_path)
    found = {name: tuple(tensor.shape) for name, tensor in tensors(tmp_path).items()}
    assert found == {
        "base_model.model.transformer.h.0.attn.c_attn.bias": (96,),
        "base_model.model.transformer.h.1.attn.c_attn.bias": (96,),
        "base_model.model.transformer.ln_f.bias": (32,),
    }
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "BITFIT" and values["target_modules"] == ["attn.c_attn", "ln_f"]


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert-classifier"])
def test_bitfit_of_all_biases_is_read_again(name, tmp_path):
    handle, inputs = biased(name), tiny.inputs_for(name)
    handle.save_pretrained(tmp_path)
    again = ts.PeftModel.from_pretrained(tiny.make(name), tmp_path).eval()
    assert torch.equal(output(again, inputs), output(handle, inputs))
    again.load_adapter(str(tmp_path))  # in place of the values it has
    assert torch.equal(output(again, inputs), output(handle, inputs))


def test_base_without_biases_is_refused_by_name():
    with pytest.raises(ts.TargetError, match="BITFIT finds nothing to train here; name target_modules, or choose another"):
        ts.get_peft_model(tiny.make("llama"), ts.BitFitConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ts.TargetError, match=r"q_proj: it is a Linear without a bias; leave it out"):
        ts.get_peft_model(tiny.make("llama"), ts.BitFitConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


@pytest.mark.parametrize("order", [["bias", "factors"], ["factors", "bias"]], ids="-".join)
def test_private_biases_act_innermost_and_are_merged_so_or_not_at_all(order):
    """A private bias takes the place of the base's own, whatever scales the output afterwards."""
    inputs = tiny.inputs_for("opt")
    handle = biased("opt", target_modules=["v_proj"])
    handle.add_adapter("factors", ts.IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False))
    names = {"bias": "default", "factors": "factors"}
    handle.set_adapter([names[name] for name in order])
    expected = output(handle, inputs)
    if order[0] == "bias":
        handle.merge_adapter()
        torch.testing.assert_close(output(handle, inputs), expected, rtol=1e-5, atol=1e-5)
        return
    with pytest.raises(ts.UsageError, match='merge it before the others: "default", "factors"'):
        handle.merge_adapter()
    assert torch.equal(output(handle, inputs), expected)
    handle.merge_adapter(["factors"])
    with pytest.raises(ts.UsageError, match="merge it before the others"):
        handle.merge_adapter(["default"])
    handle.unmerge_adapter()
    handle.merge_adapter(["default", "factors"])
    torch.testing.assert_close(output(handle, inputs), expected, rtol=1e-5, atol=1e-5)
