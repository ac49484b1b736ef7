"""Every method on 4-bit and 8-bit bases: it computes what it computes on the dense model that the stored form stands for."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from tests import quantised, tiny
from tests.handles import out
from tests.methods.test_contract import METHODS, make_config
from tests.quantised import FORMS
from tunesmith import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

INPUTS = tiny.inputs_for("llama")
LABELLED = {**INPUTS, "labels": INPUTS["input_ids"]}
each_form = pytest.mark.parametrize("form", FORMS)
ON_LINEAR = [name for name in METHODS if name != "BITFIT"]  # a Llama has no biases
PROMPTS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
}


def randomised(base, config, seed=1) -> PeftModel:
    """A handle whose adapter has random values everywhere."""
    torch.manual_seed(seed)
    handle = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    return handle


def with_the_same_adapter(handle, dense_base, config) -> PeftModel:
    other = get_peft_model(dense_base, config)
    other.adapters.load_state_dict(handle.adapters.state_dict())
    return other


def loss_and_gradients(handle, train=True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    handle.train(train).zero_grad()
    loss = handle(**LABELLED).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in handle.adapters.named_parameters()}


def assert_equal_steps(found, expected) -> None:
    """fp32 against fp32 on equal weights: sums of at most a few hundred terms in another order, through two layers."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        assert wanted.abs().sum() > 0, name
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.each_value_once
@each_form
@pytest.mark.parametrize("method", ON_LINEAR)
def test_loss_and_gradients_equal_those_on_the_dense_base(method, form, tmp_path):
    base = quantised.make(tmp_path, form)
    before, config = quantised.stored(base), make_config(method, "linear")
    dense_base = quantised.dense_copy(base)
    handle = randomised(base, config)
    other = with_the_same_adapter(handle, dense_base, config)
    for train in (True, False):
        assert_equal_steps(loss_and_gradients(handle, train), loss_and_gradients(other, train))
    torch.testing.assert_close(out(handle, INPUTS), out(other, INPUTS), rtol=1e-5, atol=1e-5)
    quantised.assert_same_stored(quantised.stored(base), before)


@pytest.mark.each_value_once
@each_form
@pytest.mark.parametrize("method", PROMPTS)
def test_virtual_tokens_on_a_quantised_base(method, form, tmp_path):
    base = quantised.make(tmp_path, form)
    before, config = quantised.stored(base), PROMPTS[method]
    dense_base = quantised.dense_copy(base)
    handle = randomised(base, config)
    other = with_the_same_adapter(handle, dense_base, config)
    assert_equal_steps(loss_and_gradients(handle), loss_and_gradients(other))
    handle.eval(), other.eval()
    found, expected = (h.generate(**INPUTS, max_new_tokens=5, do_sample=False) for h in (handle, other))
    assert torch.equal(found, expected)
    quantised.assert_same_stored(quantised.stored(base), before)


@each_form
def test_a_16_bit_step_is_within_rounding_of_fp32(form, tmp_path):
    """Of the norm: a few tens of bf16 roundings (2^-9 each), as on dense bases."""
    base = quantised.make(tmp_path, form, dtype=torch.bfloat16, compute=torch.bfloat16)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    dense_base = quantised.dense_copy(base)
    handle = randomised(base, config)
    other = with_the_same_adapter(handle, dense_base, config)
    assert all(p.dtype == torch.float32 for p in handle.adapters.parameters())
    found, expected = loss_and_gradients(handle), loss_and_gradients(other)
    assert abs(found[0] - expected[0]) < 50 * 2**-9 * expected[0]
    for name, wanted in expected[1].items():
        assert (found[1][name] - wanted).norm() < 50 * 2**-9 * wanted.norm(), name
    assert handle(**INPUTS).logits.dtype == torch.bfloat16


@each_form
def test_nothing_rewrites_what_is_stored(form, tmp_path):
    """Training, evaluation, generation, adapters off: also in modules that carry no adapter."""
    base = quantised.make(tmp_path, form, dtype=torch.bfloat16, compute=torch.bfloat16)
    before, keys = quantised.stored(base), {name: set(m.__dict__) for name, m in base.named_modules()}
    handle = randomised(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    loss_and_gradients(handle)
    handle.eval()
    with torch.no_grad():
        expected = handle(**INPUTS).logits
        handle.generate(**INPUTS, max_new_tokens=3)
        with handle.disable_adapter():
            switched_off = handle(**INPUTS).logits
        assert torch.equal(switched_off, base(**INPUTS).logits)  # outside the handle
    assert not torch.equal(expected, switched_off)
    quantised.assert_same_stored(quantised.stored(base), before)
    assert handle.unload() is base
    assert {name: set(m.__dict__) for name, m in base.named_modules()} == keys
    quantised.assert_same_stored(quantised.stored(base), before)


@each_form
def test_a_checkpoint_of_the_base_passes_both_ways_bit_for_bit(form, tmp_path):
    """Loaded, adapted, trained, saved as a whole, loaded again."""
    base = quantised.make(tmp_path, form, dtype=torch.bfloat16, compute=torch.bfloat16)
    before = quantised.stored(base)
    handle = randomised(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    expected = out(handle, INPUTS)
    base.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    for name, value in saved.items():
        assert torch.equal(value, before[name]), name
    import transformers as tf

    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    quantised.assert_same_stored(quantised.stored(again), before)
    handle.save_pretrained(tmp_path / "adapter")
    assert torch.equal(out(PeftModel.from_pretrained(again, tmp_path / "adapter").eval(), INPUTS), expected)


@each_form
def test_adapter_files_are_those_of_a_dense_base(form, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    base = quantised.make(tmp_path, form)
    dense_base = quantised.dense_copy(base)
    handle = randomised(base, config)
    with_the_same_adapter(handle, dense_base, config).save_pretrained(tmp_path / "dense")
    handle.save_pretrained(tmp_path / "quantised")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("quantised", "dense"))
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in found)
    files = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("quantised", "dense")]
    assert files[0] == files[1]


@pytest.mark.each_value_once
@each_form
@pytest.mark.parametrize("name", ["lm_head", "q_proj", "layers.1.mlp"])
def test_modules_saved_whole_are_dense_copies(name, form, tmp_path):
    """Of a head, which is not quantised; of a module that is; of a block that holds such."""
    config = LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=[name], init_lora_weights=False)
    base = quantised.make(tmp_path, form)
    before = quantised.stored(base)
    dense_base = quantised.dense_copy(base)
    handle = randomised(base, config)
    other = with_the_same_adapter(handle, dense_base, config)
    assert_equal_steps(loss_and_gradients(handle), loss_and_gradients(other))
    handle.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantised.make(tmp_path, form), tmp_path / "adapter").eval()
    assert torch.equal(out(again, INPUTS), out(handle.eval(), INPUTS))
    quantised.assert_same_stored(quantised.stored(base), before)


@each_form
def test_several_handles_mixed_rows_and_switching(form, tmp_path):
    base = quantised.make(tmp_path, form)
    dense_base = quantised.dense_copy(base)
    first, second = LoraConfig(target_modules="all-linear"), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    handle = randomised(base, first)
    handle.add_adapter("second", second)
    randomised(base, LoraConfig(target_modules=["up_proj"]), seed=2)  # another handle, which nothing here sees
    other = with_the_same_adapter(randomised(base, first), dense_base, first)
    other.adapters["default"].load_state_dict(handle.adapters["default"].state_dict())
    other.add_adapter("second", second)
    with torch.no_grad():
        handle.tree("second").get_submodule("model.layers.0.self_attn.q_proj._adapter").ia3_l.mul_(1.5)
        other.tree("second").load_state_dict(handle.tree("second").state_dict())
        for h in (handle, other):
            h.eval()
        for names in (["default", "second"], ["__base__", "default"], ["second", "__base__"]):
            found, expected = (h(**INPUTS, adapter_names=names).logits for h in (handle, other))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for h in (handle, other):
            h.set_adapter(["default", "second"])
        torch.testing.assert_close(out(handle, INPUTS), out(other, INPUTS), rtol=1e-5, atol=1e-5)


@each_form
def test_gradient_checkpointing(form, tmp_path):
    base = quantised.make(tmp_path, form)
    handle = randomised(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    expected = loss_and_gradients(handle)
    expected = expected[0], {name: g.clone() for name, g in expected[1].items()}
    for reentrant in (False, True):
        handle.gradient_checkpointing_enable({"use_reentrant": reentrant})
        handle.enable_input_require_grads()
        assert_equal_steps(loss_and_gradients(handle), expected)


@each_form
def test_copies_and_pickles(form, tmp_path):
    handle = randomised(quantised.make(tmp_path, form), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = out(handle, INPUTS)
    before = quantised.stored(handle.bare_base)
    for copied in (copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        assert torch.equal(out(copied, INPUTS), expected)
        quantised.assert_same_stored(quantised.stored(copied.bare_base), before)


@each_form
def test_parameters_are_counted_as_on_the_dense_base(form, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear")
    base = quantised.make(tmp_path, form)
    dense_base = quantised.dense_copy(base)
    assert get_peft_model(base, config).get_nb_trainable_parameters() == (
        get_peft_model(dense_base, config).get_nb_trainable_parameters()
    )
