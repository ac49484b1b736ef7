"""What every registered module method must do, whatever its mathematics. A new method is in this suite by registering."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests import tiny
from tunesmith import ConfigError, PeftModel, get_peft_model
from tunesmith.bases.view import view_of
from tunesmith.config import TargetedConfig
from tunesmith.registry import all_methods

METHODS = {name: method.config for name, method in all_methods().items() if issubclass(method.config, TargetedConfig)}
LAYERS = {  # model, targets
    "linear": ("llama", ["q_proj", "v_proj", "down_proj"]),
    "linear with bias": ("bloom", ["query_key_value", "dense_4h_to_h"]),
    "conv1d": ("gpt2", ["c_attn", "mlp.c_proj"]),
}
EXTRA = {"IA3": lambda targets: {"feedforward_modules": targets[-1:]}}

# What flags make of a method goes through the same tests under a name of its own.
VARIANTS = {
    "LORA, use_dora": ("LORA", {"use_dora": True}),
    "LORA, orthogonal": ("LORA", {"init_lora_weights": "orthogonal"}),
    "LORA, pissa": ("LORA", {"init_lora_weights": "pissa"}),
    "LORA, pissa_niter_4": ("LORA", {"init_lora_weights": "pissa_niter_4"}),
    "LORA, olora": ("LORA", {"init_lora_weights": "olora"}),
    "LORA, loftq": ("LORA", {"init_lora_weights": "loftq"}),
}
METHODS |= {name: METHODS[method] for name, (method, _) in VARIANTS.items()}
EXTRA |= {name: lambda _, fields=fields: fields for name, (_, fields) in VARIANTS.items()}
# Starts whose two parts cancel: the base's output up to the rounding of as many sums as the model has layers.
CANCELS = [f"LORA, {start}" for start in ("orthogonal", "pissa", "pissa_niter_4", "olora")]
CHANGES = ["LORA, loftq"]  # starts as a quantised base


def handle_on(method: str, layer: str, dtype: torch.dtype = torch.float64) -> tuple[PeftModel, nn.Module, dict]:
    """A handle with random, non-trivial adapter values, its untouched twin base, and inputs."""
    name, targets = LAYERS[layer]
    base = tiny.make(name).to(dtype)
    twin = copy.deepcopy(base)
    handle = get_peft_model(base, make_config(method, targets))
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return handle.eval(), twin, tiny.inputs_for(name)


def make_config(method: str, targets: list[str]) -> TargetedConfig:
    return METHODS[method](task_type="CAUSAL_LM", target_modules=targets, **EXTRA.get(method, lambda _: {})(targets))


each = pytest.mark.parametrize(("method", "layer"), [(m, layer) for m in METHODS for layer in LAYERS])


@each
def test_starts_as_the_base(method, layer):
    name, targets = LAYERS[layer]
    base, inputs = tiny.make(name), tiny.inputs_for(name)
    expected = base(**inputs).logits
    found = get_peft_model(base, make_config(method, targets)).eval()(**inputs).logits
    if method in CANCELS:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    elif method in CHANGES:
        assert 1e-4 < (found - expected).abs().max() < 0.5 * expected.std()
    else:
        assert torch.equal(found, expected)


@each
def test_changes_the_output_and_can_be_switched_off_exactly(method, layer):
    handle, twin, inputs = handle_on(method, layer)
    expected = twin(**inputs).logits
    assert (handle(**inputs).logits - expected).abs().max() > 1e-3
    with handle.disable_adapter():
        assert torch.equal(handle(**inputs).logits, expected)


@each
def test_merged_equals_unmerged_and_unmerging_is_bit_exact(method, layer):
    handle, twin, inputs = handle_on(method, layer)
    expected = handle(**inputs).logits
    handle.merge_adapter()
    torch.testing.assert_close(handle(**inputs).logits, expected, rtol=1e-10, atol=1e-10)
    handle.unmerge_adapter()
    assert all(torch.equal(p, q) for p, q in zip(handle.base_model.parameters(), twin.parameters()))
    assert torch.equal(handle(**inputs).logits, expected)


@each
def test_saved_and_loaded_bit_exact(method, layer, tmp_path):
    handle, twin, inputs = handle_on(method, layer, torch.float32)
    handle.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(twin, tmp_path).eval()(**inputs).logits, handle(**inputs).logits)


@each
def test_only_the_adapter_gets_gradients_and_all_of_it_does(method, layer):
    handle, _, inputs = handle_on(method, layer)
    handle.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    missing = [name for name, p in handle.adapters.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing and all(p.grad is None for p in handle.base_model.parameters())


@each
def test_gradients_equal_those_through_the_merged_weights(method, layer):
    handle, twin, inputs = handle_on(method, layer)
    merged = {}
    for path, adapter in handle.tree("default").items():
        view = view_of(twin.get_submodule(path))
        weight, bias = adapter.merge(view.weight(), view.bias, view)
        merged |= {f"{path}.weight": view.stored(weight)} | ({} if bias is None else {f"{path}.bias": bias})
    parameters = list(handle.adapters.parameters())
    through_merged = torch.func.functional_call(twin, merged, kwargs=inputs).logits.square().sum()
    expected = torch.autograd.grad(through_merged, parameters)
    found = torch.autograd.grad(handle(**inputs).logits.square().sum(), parameters)
    for got, wanted in zip(found, expected):  # norms and softmax compute in fp32 inside whatever the model's type
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("second", METHODS)
def test_two_methods_active_at_once_fold_and_merge_alike(first, second):
    handle, _, inputs = handle_on(first, "linear")
    handle.add_adapter("second", make_config(second, LAYERS["linear"][1]))
    with torch.no_grad():
        for parameter in handle.tree("second").parameters():
            parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    handle.set_adapter(["default", "second"])
    expected = handle(**inputs).logits
    handle.merge_adapter()
    torch.testing.assert_close(handle(**inputs).logits, expected, rtol=1e-10, atol=1e-10)


def test_every_method_rejects_an_unknown_field():
    for config in METHODS.values():
        with pytest.raises(ConfigError, match="no field"):
            config(not_a_field=1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "t5", "mt5", "bert-classifier"])
def test_ia3_equals_peft_in_both_directions(name, tmp_path):
    import peft

    base, inputs, task = tiny.make(name), tiny.inputs_for(name), tiny.task_of(name)
    ours = get_peft_model(base, METHODS["IA3"](task_type=task, init_ia3_weights=False)).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny.make(name), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(tiny.main_output(ours(**inputs)), tiny.main_output(theirs(**inputs)), rtol=1e-5, atol=1e-5)
        made = peft.get_peft_model(tiny.make(name), peft.IA3Config(task_type=task, init_ia3_weights=False)).eval()
        made.save_pretrained(tmp_path / "theirs")
        loaded = PeftModel.from_pretrained(base, tmp_path / "theirs").eval()
        torch.testing.assert_close(tiny.main_output(loaded(**inputs)), tiny.main_output(made(**inputs)), rtol=1e-5, atol=1e-5)
        assert ours.get_nb_trainable_parameters()[0] == made.get_nb_trainable_parameters()[0]
