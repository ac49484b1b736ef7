"""What every registered module method must do, whatever its mathematics. A new method is in this suite by registering."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests import tiny
from tunesmith import ConfigError, PeftModel, UsageError, get_peft_model
from tunesmith.adapter import ParameterAdapter, SublayerAdapter
from tunesmith.bases.view import view_of
from tunesmith.config import TargetedConfig
from tunesmith.registry import all_methods

ELSEWHERE = {"ADAPTION_PROMPT"}  # finds its attention modules by itself; test_prompts.py has it
METHODS = {
    name: method.config
    for name, method in all_methods().items()
    if issubclass(method.config, TargetedConfig) and name not in ELSEWHERE
}
ON_BLOCKS = [name for name in METHODS if issubclass(all_methods()[name].adapter, SublayerAdapter)]
MERGEABLE = [name for name in METHODS if name not in ON_BLOCKS]
LAYERS = {  # model, targets
    "linear": ("llama", ["q_proj", "v_proj", "down_proj"]),
    "linear with bias": ("bloom", ["query_key_value", "dense_4h_to_h"]),
    "conv1d": ("gpt2", ["c_attn", "mlp.c_proj"]),
}
BLOCKS = {"llama": ["self_attn", "mlp"], "bloom": ["self_attention", "mlp"], "gpt2": ["attn", "mlp"]}
NORMS = {"llama": ["input_layernorm", "norm"], "bloom": ["input_layernorm", "ln_f"], "gpt2": ["ln_1", "ln_f"]}
EXTRA = {
    "IA3": lambda targets: {"feedforward_modules": targets[-1:]},
    "ADALORA": lambda _: {"total_step": 10, "orth_reg_weight": 0.1},
    "OFT": lambda _: {"oft_block_size": 8},
    "BOFT": lambda _: {"boft_n_butterfly_factor": 3},
    "BOTTLENECK": lambda _: {"non_linearity": "gelu"},  # units of a relu can be off for every input: no gradient
}
WITHOUT_BIASES = {("BITFIT", "linear")}  # there is nothing for BitFit to train in a Llama; it has its own test below
# Reflections that undo each other in exact arithmetic: about 2 r rounded sums for each of a few layers.
STARTS_WITHIN_ROUNDING = {"HRA"}

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
MERGEABLE += list(VARIANTS)
EXTRA |= {name: lambda _, fields=fields: fields for name, (_, fields) in VARIANTS.items()}
# Inits whose two parts cancel: the base's output up to the rounding of as many sums as the model has layers.
CANCELS = [f"LORA, {init}" for init in ("orthogonal", "pissa", "pissa_niter_4", "olora")]
CHANGES = ["LORA, loftq"]  # starts as a quantised base


def handle_on(method: str, layer: str, dtype: torch.dtype = torch.float64) -> tuple[PeftModel, nn.Module, dict]:
    """A handle with random, non-trivial adapter values, an untouched copy of its base, and inputs."""
    name = LAYERS[layer][0]
    base = tiny.make(name).to(dtype)
    plain_base = copy.deepcopy(base)
    handle = get_peft_model(base, make_config(method, layer))
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return handle.eval(), plain_base, tiny.inputs_for(name)


def make_config(method: str, layer: str) -> TargetedConfig:
    name, targets = LAYERS[layer]
    targets = BLOCKS[name] if method in ON_BLOCKS else NORMS[name] if method == "LN_TUNING" else targets
    return METHODS[method](task_type="CAUSAL_LM", target_modules=targets, **EXTRA.get(method, lambda _: {})(targets))


COMBINATIONS = [(method, layer) for method in METHODS for layer in LAYERS if (method, layer) not in WITHOUT_BIASES]
each = pytest.mark.parametrize(("method", "layer"), COMBINATIONS)
each_mergeable = pytest.mark.parametrize(("method", "layer"), [pair for pair in COMBINATIONS if pair[0] in MERGEABLE])


@pytest.mark.each_value_once
@each
def test_starts_as_the_base(method, layer):
    name = LAYERS[layer][0]
    base, inputs = tiny.make(name), tiny.inputs_for(name)
    expected = base(**inputs).logits
    found = get_peft_model(base, make_config(method, layer)).eval()(**inputs).logits
    if method in CHANGES:
        assert 1e-4 < (found - expected).abs().max() < 0.5 * expected.std()
        return
    tolerance = 1e-5 if method in CANCELS else 1e-6 if method in STARTS_WITHIN_ROUNDING else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.each_value_once
@each
def test_changes_the_output_and_can_be_switched_off_exactly(method, layer):
    handle, plain_base, inputs = handle_on(method, layer)
    expected = plain_base(**inputs).logits
    assert (handle(**inputs).logits - expected).abs().max() > 1e-3
    with handle.disable_adapter():
        assert torch.equal(handle(**inputs).logits, expected)


@pytest.mark.each_value_once
@each_mergeable
def test_merged_equals_unmerged_and_unmerging_is_bit_exact(method, layer):
    handle, plain_base, inputs = handle_on(method, layer)
    expected = handle(**inputs).logits
    handle.merge_adapter()
    torch.testing.assert_close(handle(**inputs).logits, expected, rtol=1e-10, atol=1e-10)
    handle.unmerge_adapter()
    assert all(torch.equal(p, q) for p, q in zip(handle.bare_base.parameters(), plain_base.parameters()))
    assert torch.equal(handle(**inputs).logits, expected)


@pytest.mark.each_value_once
@each
def test_saved_and_loaded_bit_exact(method, layer, tmp_path):
    handle, plain_base, inputs = handle_on(method, layer, torch.float32)
    handle.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(plain_base, tmp_path).eval()(**inputs).logits, handle(**inputs).logits)


@pytest.mark.each_value_once
@each
def test_fp32_masters_compute_in_the_type_of_a_16_bit_base(method, layer):
    """The error is that of a few tens of bf16 roundings (2^-9 each), in the sense of the norm."""
    handle, _, inputs = handle_on(method, layer, torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in handle.adapters.parameters())
    wide = copy.deepcopy(handle).float()
    expected, found = wide(**inputs).logits, handle(**inputs).logits
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 50 * 2**-9 * expected.norm()
    handle.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in handle.adapters.parameters())
    if method not in MERGEABLE:
        return
    handle.eval().merge_adapter()
    assert all(parameter.dtype == torch.bfloat16 for parameter in handle.bare_base.parameters())
    assert (handle(**inputs).logits - expected).norm() < 50 * 2**-9 * expected.norm()


@pytest.mark.each_value_once
@each
def test_only_the_adapter_gets_gradients_and_all_of_it_does(method, layer):
    handle, _, inputs = handle_on(method, layer)
    handle.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    missing = [name for name, p in handle.adapters.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing and all(p.grad is None for p in handle.bare_base.parameters())


@pytest.mark.each_value_once
@each_mergeable
def test_gradients_equal_those_through_the_merged_weights(method, layer):
    handle, plain_base, inputs = handle_on(method, layer)
    merged = {}
    for path, adapter in handle.tree("default").items():
        if isinstance(adapter, ParameterAdapter):
            merged |= {f"{path}.{name}": value for name, value in adapter.replaced(plain_base.get_submodule(path)).items()}
            continue
        view = view_of(plain_base.get_submodule(path))
        weight, bias = adapter.merge(view.weight(), view.bias, view)
        merged |= {f"{path}.weight": view.stored(weight)} | ({} if bias is None else {f"{path}.bias": bias})
    parameters = list(handle.adapters.parameters())
    through_merged = torch.func.functional_call(plain_base, merged, kwargs=inputs).logits.square().sum()
    expected = torch.autograd.grad(through_merged, parameters)
    found = torch.autograd.grad(handle(**inputs).logits.square().sum(), parameters)
    for got, wanted in zip(found, expected):  # norms and softmax compute in fp32 inside whatever the model's type
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.matrix if name in VARIANTS else ()) for name in METHODS]
)
def test_compiles_into_one_graph_with_the_same_gradients(method):
    layer = "conv1d" if (method, "linear") in WITHOUT_BIASES else "linear"
    handle, _, inputs = handle_on(method, layer, torch.float32)
    parameters = list(handle.adapters.parameters())
    handle(**inputs)  # the check of the first call is not part of the graph
    expected = handle(**inputs).logits
    gradients = torch.autograd.grad(expected.cos().mean(), parameters)
    torch.compiler.reset()
    found = torch.compile(handle, backend="aot_eager", fullgraph=True)(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(torch.autograd.grad(found.cos().mean(), parameters), gradients):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


ON_LINEAR = [method for method, layer in COMBINATIONS if layer == "linear"]
REPLACES = [name for name in METHODS if issubclass(all_methods()[METHODS[name].method].adapter, ParameterAdapter)]
# Two private values of one parameter cannot both act; test_several_adapters.py has that they are refused.
TOGETHER = [(first, second) for first in ON_LINEAR for second in ON_LINEAR if not (first == second and first in REPLACES)]


@pytest.mark.each_value_once
@pytest.mark.parametrize(("first", "second"), TOGETHER)
def test_two_methods_active_at_once_fold_and_merge_alike(first, second):
    """Those on blocks stay beside the base while the others are merged into it."""
    handle, _, inputs = handle_on(first, "linear")
    handle.add_adapter("second", make_config(second, "linear"))
    with torch.no_grad():
        for parameter in handle.tree("second").parameters():
            parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    alone = handle(**inputs).logits
    handle.set_adapter(["default", "second"])
    expected = handle(**inputs).logits
    assert (expected - alone).abs().max() > 1e-3
    mergeable = [name for name, method in (("default", first), ("second", second)) if method in MERGEABLE]
    if mergeable:
        handle.merge_adapter(mergeable)
    torch.testing.assert_close(handle(**inputs).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ON_BLOCKS)
def test_what_changes_a_blocks_output_cannot_be_merged_and_says_so(method):
    handle, _, inputs = handle_on(method, "linear")
    expected = handle(**inputs).logits
    for merge in (handle.merge_adapter, handle.merge_and_unload):
        with pytest.raises(UsageError, match="not weight changes"):
            merge()
    assert torch.equal(handle(**inputs).logits, expected)


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
