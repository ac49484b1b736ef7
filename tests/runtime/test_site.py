"""Sites and accelerate's hooks, in any order of coming and going (rules 4 and 7)."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from torch import nn

from tests import tiny
from tests.handles import assert_same_gradients, gradients, lora, out
from tunesmith import TargetError, UsageError
from tunesmith.runtime.site import site_of

PATH = "model.layers.0.self_attn.q_proj"


class Counting(ModelHook):
    """A hook that changes nothing and counts its calls."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def _hook(base):
    hook = Counting()
    add_hook_to_module(base.get_submodule(PATH), hook)
    return hook


def _unhook(base):
    remove_hook_from_module(base.get_submodule(PATH))


@pytest.fixture
def expected(llama, llama_inputs):
    return out(lora(tiny.make("llama")), llama_inputs)


@pytest.mark.parametrize("when", ["hook first", "adapter first"])
def test_hooks_and_adapters_both_act_whichever_came_first(llama, llama_inputs, expected, when):
    plain = out(llama, llama_inputs)
    if when == "hook first":
        hook, handle = _hook(llama), lora(llama)
    else:
        handle, hook = lora(llama), _hook(llama)
    assert torch.equal(out(handle, llama_inputs), expected) and hook.calls == 1
    assert torch.equal(out(llama, llama_inputs), plain) and hook.calls == 2


@pytest.mark.parametrize("attach", ["before the hook", "under the hook"])
@pytest.mark.parametrize("detach", ["hook first", "adapter first"])
def test_removing_one_leaves_the_other_effective(llama, llama_inputs, expected, attach, detach):
    plain = out(llama, llama_inputs)
    if attach == "before the hook":
        handle, hook = lora(llama), _hook(llama)
    else:
        hook, handle = _hook(llama), lora(llama)
    if detach == "hook first":
        _unhook(llama)
        assert torch.equal(out(handle, llama_inputs), expected) and hook.calls == 0
        handle.unload()
    else:
        handle.unload()
        assert torch.equal(out(llama, llama_inputs), plain) and hook.calls == 1, "detaching removed another's hook"
        _unhook(llama)
    assert torch.equal(out(llama, llama_inputs), plain)
    assert not any(site_of(module) for module in llama.modules())
    assert torch.equal(out(lora(llama), llama_inputs), expected), "what hooks leave behind does not stop a new adapter"


def test_stacked_hooks_and_a_second_handle(llama, llama_inputs, expected):
    first = _hook(llama)
    handle = lora(llama, 1)
    second = Counting()
    add_hook_to_module(llama.get_submodule(PATH), second, append=True)
    assert isinstance(llama.get_submodule(PATH)._hf_hook, SequentialHook)
    other = lora(llama, 2)
    assert torch.equal(out(handle, llama_inputs), expected)
    assert torch.equal(out(other, llama_inputs), out(lora(tiny.make("llama"), 2), llama_inputs))
    assert first.calls == second.calls == 2


@pytest.mark.parametrize("when", ["hook first", "adapter first"])
def test_cpu_offloading(llama, llama_inputs, expected, when):
    plain = out(llama, llama_inputs)
    if when == "hook first":
        cpu_offload(llama, execution_device="cpu")
        handle = lora(llama)
    else:
        handle = lora(llama)
        cpu_offload(llama, execution_device="cpu")
    assert llama.get_submodule(PATH).weight.device.type == "meta"
    assert all(p.device.type == "cpu" for p in handle.adapters.parameters())
    assert torch.equal(out(handle, llama_inputs), expected)
    assert torch.equal(out(llama, llama_inputs), plain)
    with pytest.raises(UsageError, match="offloaded"):
        handle.merge_adapter()
    assert torch.equal(out(handle, llama_inputs), expected)


def test_training_on_an_offloaded_base_gives_the_same_gradients(llama, llama_inputs):
    reference = lora(tiny.make("llama")).train()
    reference(**llama_inputs, labels=llama_inputs["input_ids"]).loss.backward()
    cpu_offload(llama, execution_device="cpu")
    handle = lora(llama).train()
    handle(**llama_inputs, labels=llama_inputs["input_ids"]).loss.backward()
    assert_same_gradients(gradients(handle), gradients(reference), rtol=0, atol=0)


@pytest.mark.parametrize("when", ["dispatch first", "adapter first"])
def test_dispatch_to_disk(llama, llama_inputs, expected, tmp_path, when):
    layout = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip

    def dispatch():
        dispatch_model(llama, device_map=layout, main_device="cpu", offload_dir=str(tmp_path))

    if when == "dispatch first":
        dispatch()
    handle = lora(llama)
    if when == "adapter first":
        dispatch()
    assert llama.get_submodule(PATH).weight.device.type == "meta"
    assert torch.equal(out(handle, llama_inputs), expected)
    unhooked = lora(tiny.make("llama"))
    generated = [model.generate(llama_inputs["input_ids"], max_new_tokens=2, do_sample=False) for model in (handle, unhooked)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["ln_f"]}, {"bias": "all"}], ids=["modules_to_save", "bias"])
def test_private_copies_of_offloaded_tensors_are_refused(fields):
    """A copy of a placeholder would hold no values, so it would neither act nor train."""
    base = tiny.make("gpt2")
    cpu_offload(base, execution_device="cpu")
    with pytest.raises(TargetError, match=r"transformer\.ln_f: it is offloaded"):
        lora(base, **fields)


def test_adapters_are_placed_where_an_offloaded_module_computes():
    linear = nn.Sequential(nn.Linear(4, 4))
    add_hook_to_module(linear[0], AlignDevicesHook(execution_device="meta", offload=False))
    linear[0]._hf_hook.execution_device = "meta"  # stands for an accelerator on a machine without one
    handle = lora(linear, target_modules=["0"])
    assert {p.device.type for p in handle.adapters.parameters()} == {"meta"}


def test_a_forward_that_somebody_else_replaced_is_refused_by_name(llama):
    module = llama.get_submodule(PATH)
    replacement = lambda x: x  # noqa: E731
    module.forward = replacement
    with pytest.raises(TargetError, match=r"model\.layers\.0\.self_attn\.q_proj: its forward was replaced"):
        lora(llama)
    assert module.forward is replacement
    assert not any(site_of(other) for other in llama.modules())


def test_a_replaced_forward_under_a_hook_is_refused_by_name(llama):
    module = llama.get_submodule(PATH)
    module.forward = lambda x: x
    add_hook_to_module(module, Counting())
    with pytest.raises(TargetError, match="q_proj: its forward was replaced"):
        lora(llama)


def test_removing_all_hooks_of_a_model_keeps_adapters(llama, llama_inputs, expected):
    cpu_offload(llama, execution_device="cpu")
    handle = lora(llama)
    remove_hook_from_submodules(llama)
    assert torch.equal(out(handle, llama_inputs), expected)


def test_a_hooked_base_can_be_copied(llama, llama_inputs, expected):
    _hook(llama)
    handle = lora(llama)
    copied = copy.deepcopy(handle)
    assert torch.equal(out(copied, llama_inputs), expected)
    assert copied.bare_base.get_submodule(PATH)._old_forward.module() is copied.bare_base.get_submodule(PATH)
