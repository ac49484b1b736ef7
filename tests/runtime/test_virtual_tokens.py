"""What every method at the model's entrance must do: virtual tokens and prefixes, whatever computes them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests import tiny
from tests.handles import assert_same_state, out, prefixed, state
from tunesmith import AdaptionPromptConfig, LoraConfig, PeftModel, PrefixTuningConfig, UsageError, get_peft_model
from tunesmith.config import PromptConfig
from tunesmith.registry import all_methods
from tunesmith.runtime.prefix import PrefixedAttention, PrefixedStack
from tunesmith.runtime.site import site_of

METHODS = {name: method.config for name, method in all_methods().items() if issubclass(method.config, PromptConfig)}
EXTRA = {"PREFIX_TUNING": {"prefix_projection": True}, "MULTITASK_PROMPT_TUNING": {"num_tasks": 2}}
MODELS = ["llama", "gpt2", "t5", "bert-tagger"]
each = pytest.mark.parametrize(("method", "name"), [(method, name) for method in METHODS for name in MODELS])


def handle_on(base, method: str, name: str, seed: int = 1, **fields) -> PeftModel:
    torch.manual_seed(seed)
    fields = {**EXTRA.get(method, {}), **fields}
    handle = get_peft_model(base, METHODS[method](task_type=tiny.task_of(name), num_virtual_tokens=3, **fields))
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return handle.eval()


def inputs_for(method: str, name: str) -> dict:
    return tiny.inputs_for(name) | ({"task_ids": torch.tensor([1, 0])} if method == "MULTITASK_PROMPT_TUNING" else {})


def plain_inputs(inputs: dict) -> dict:
    return {key: value for key, value in inputs.items() if key != "task_ids"}


@pytest.mark.each_value_once
@each
def test_changes_the_output_and_can_be_switched_off_exactly(method, name):
    base, inputs = tiny.make(name), inputs_for(method, name)
    expected = out(base, plain_inputs(inputs))
    handle = handle_on(base, method, name, modules_to_save=["classifier"] if name == "bert-tagger" else None)
    changed = out(handle, inputs)[:, -expected.shape[1] :]
    assert (changed - expected).abs().max() > 1e-4
    with handle.disable_adapter():
        assert torch.equal(out(handle, inputs), expected)
    assert torch.equal(out(base, plain_inputs(inputs)), expected)
    assert torch.equal(out(handle, inputs)[:, -expected.shape[1] :], changed)


@pytest.mark.each_value_once
@each
def test_several_handles_on_one_base_do_not_see_each_other(method, name):
    alone = [out(handle_on(tiny.make(name), method, name, seed), inputs_for(method, name)) for seed in (1, 2)]
    base = tiny.make(name)
    before = state(base)
    handles = [handle_on(base, method, name, seed) for seed in (1, 2)]
    for handle, expected in zip(handles, alone):
        assert torch.equal(out(handle, inputs_for(method, name)), expected)
    assert not torch.equal(*alone)
    assert_same_state(before, state(base))


@pytest.mark.each_value_once
@each
def test_copies_of_handles_act_and_copies_of_bases_are_plain(method, name):
    base, inputs = tiny.make(name), inputs_for(method, name)
    plain = out(base, plain_inputs(inputs))
    handle = handle_on(base, method, name)
    expected = out(handle, inputs)
    copied = copy.deepcopy(handle)
    for model in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(out(model, plain_inputs(inputs)), plain)
        assert all(site_of(module) is None for module in model.modules())
    with torch.no_grad():
        next(handle.adapters.parameters()).zero_()
    assert torch.equal(out(copied, inputs), expected)
    assert torch.equal(out(copied.bare_base, plain_inputs(inputs)), plain)


@pytest.mark.each_value_once
@each
def test_unloading_leaves_nothing_behind(method, name):
    base, inputs = tiny.make(name), inputs_for(method, name)
    plain = out(base, plain_inputs(inputs))
    assert handle_on(base, method, name).unload() is base
    assert not any("forward" in module.__dict__ for module in base.modules())
    assert all(p.requires_grad for p in base.parameters())
    assert torch.equal(out(base, plain_inputs(inputs)), plain)


@pytest.mark.each_value_once
@each
def test_saved_and_loaded_bit_exact_for_inference_and_for_training(method, name, tmp_path):
    base, inputs = tiny.make(name), inputs_for(method, name)
    handle = handle_on(base, method, name)
    handle.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    assert torch.equal(out(again, inputs), out(handle, inputs))
    materialized = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(out(materialized, inputs), out(handle, inputs), atol=1e-6, rtol=0)


@pytest.mark.each_value_once
@each
def test_only_the_adapter_gets_gradients(method, name):
    handle = handle_on(tiny.make(name).double(), method, name).double().train()
    out_of = tiny.main_output(handle(**inputs_for(method, name)))
    out_of.square().sum().backward()
    missing = [key for key, p in handle.adapters.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing and all(p.grad is None for p in handle.bare_base.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_beside_lora_both_act(method):
    base, inputs = tiny.make("llama"), inputs_for(method, "llama")
    handle = handle_on(base, method, "llama")
    alone = out(handle, inputs)
    handle.add_adapter("lora", LoraConfig(init_lora_weights=False))
    handle.set_adapter(["default", "lora"])
    assert (out(handle, inputs) - alone).abs().max() > 1e-4
    handle.set_adapter("default")
    assert torch.equal(out(handle, inputs), alone)


@pytest.mark.parametrize("method", [*METHODS, "ADAPTION_PROMPT"])
def test_beside_an_offloaded_base(method):
    """accelerate keeps the weights elsewhere and puts them in place for each module's call."""
    from accelerate import cpu_offload

    def made(base):
        if method != "ADAPTION_PROMPT":
            return handle_on(base, method, "llama")
        torch.manual_seed(1)
        handle = get_peft_model(base, AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)).eval()
        for name, parameter in handle.adapters.named_parameters():
            torch.nn.init.ones_(parameter) if name.endswith("gate") else None
        return handle

    inputs, base = inputs_for(method, "llama"), tiny.make("llama")
    expected = out(made(tiny.make("llama")), inputs)
    cpu_offload(base)
    handle = made(base)
    assert not any(p.is_meta for p in handle.adapters.parameters())
    assert torch.equal(out(handle, inputs), expected)


# --- prefixes -------------------------------------------------------------------------------------------------------


def test_a_prefix_lengthens_neither_the_callers_inputs_nor_an_empty_cache_given_for_something_else(llama, llama_inputs):
    handle = prefixed(llama)
    kept = {name: value.clone() for name, value in llama_inputs.items()}
    results = [out(handle, llama_inputs) for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert all(torch.equal(value, llama_inputs[name]) for name, value in kept.items())


def test_without_a_cache_wanted_none_is_filled(llama, llama_inputs):
    handle = prefixed(llama)
    with torch.no_grad():
        kept = handle(**llama_inputs, use_cache=True).past_key_values
        passing = handle(**llama_inputs, use_cache=False)
    assert kept.get_seq_length() == 3 + 7
    assert passing.past_key_values is None or passing.past_key_values.get_seq_length() == 3
    assert torch.equal(passing.logits, out(handle, llama_inputs))


def test_decoders_obtained_from_a_handle_have_the_prefix(llama, llama_inputs):
    handle = prefixed(llama)
    hidden = handle.get_decoder()(**llama_inputs).last_hidden_state
    assert torch.equal(llama.lm_head(hidden), out(handle, llama_inputs))


@pytest.mark.parametrize("taken", [PrefixedStack, PrefixedAttention])
def test_what_stands_around_the_layers_is_needed(taken, llama, llama_inputs, monkeypatch):
    """Were one of the two not to act, the tests of checkpointing could tell."""
    handle = prefixed(llama).train()
    tiny.enable_recomputing(handle, {"use_reentrant": False})
    inputs = {**llama_inputs, "labels": llama_inputs["input_ids"]}
    handle(**inputs).loss.backward()
    expected = handle.tree("default").prompt.embedding.grad.clone()
    handle.zero_grad()
    monkeypatch.setattr(taken, "__call__", lambda self, call, *args, **kwargs: call(*args, **kwargs))
    try:
        handle(**inputs).loss.backward()
    except (RuntimeError, ValueError):
        return
    found = handle.tree("default").prompt.embedding.grad
    assert found is None or not torch.allclose(found, expected)


def test_a_stack_that_the_base_passes_by_is_an_error(llama, llama_inputs):
    handle = prefixed(llama)
    inner = llama.model
    del inner.__dict__["forward"]
    assert site_of(inner) is None
    with pytest.raises(UsageError, match="the prefix had no effect"):
        handle(**llama_inputs)


def test_bases_whose_forward_was_replaced_are_refused(llama):
    llama.model.forward = lambda *args, **kwargs: None
    with pytest.raises(Exception, match="its forward was replaced"):
        get_peft_model(llama, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


@pytest.mark.parametrize("rows", [[2, 0], [3, 1]])
def test_rows_may_have_prefixes_of_different_lengths(rows, llama, llama_inputs):
    """The form that batches of several adapters need: columns a row lacks are padding to it."""
    from tunesmith.runtime.prefix import extend, find_stack
    from tunesmith.runtime.virtual_tokens import input_spec_of

    handle = prefixed(llama)
    stack = llama.get_submodule(find_stack(llama).path)
    prompt = handle.tree("default").prompt
    layers = [prompt(i)[:, None].expand(-1, 2, -1, -1, -1) for i in range(2)]
    lengths = torch.tensor(rows)
    real = torch.arange(3)[None] >= 3 - lengths[:, None]  # padding at the left
    entrance = input_spec_of(stack, frozenset(["position_ids", "attention_mask"]), labels_per_token=False, classifies=False)
    inputs = {"input_ids": llama_inputs["input_ids"], "use_cache": False}
    with torch.no_grad():
        together = stack(**extend(inputs, layers, 3, stack, entrance, real)).last_hidden_state
        for i, n in enumerate(rows):
            own = {"input_ids": inputs["input_ids"][i : i + 1], "use_cache": False}
            if n:
                part = [prompt(layer)[:, :, 3 - n :] for layer in range(2)]
                own = extend(own, part, n, stack, entrance)
            torch.testing.assert_close(together[i], stack(**own).last_hidden_state[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_rows_may_have_virtual_tokens_of_different_numbers(name, side):
    from tests.parity.test_generation import LENGTHS, real, uneven
    from tunesmith.runtime.virtual_tokens import extend

    base = tiny.make(name)
    handle = handle_on(base, "PROMPT_TUNING", name)
    embed, tokens = base.get_input_embeddings(), torch.randn(3, 3, 32)
    counts = torch.tensor([2, 0, 3])
    own_tokens = torch.arange(3)[None] >= 3 - counts[:, None]
    rows, batch = uneven(side)
    with torch.no_grad():
        together = base(**extend(batch, tokens, embed, handle.input_spec, own_tokens)).logits
        for i, n in enumerate(counts.tolist()):
            alone = {"input_ids": rows[i], "attention_mask": torch.ones_like(rows[i])}
            if n:
                alone = extend(alone, tokens[i, 3 - n :], embed, handle.input_spec)
            own = base(**alone).logits[0, -LENGTHS[i] :]
            torch.testing.assert_close(together[i, real(i, side, before=3)], own, atol=1e-5, rtol=0)
