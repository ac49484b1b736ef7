"""The base is never rebuilt: whatever handles do, it stays what it was (rules 1, 6, 7, 13)."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from tests import tiny
from tests.handles import MAKERS, assert_same_state, lora, out, prompted, state
from tunesmith import LoraConfig, TargetError, get_peft_model
from tunesmith.runtime.frame import current_frame
from tunesmith.runtime.site import site_of


def test_two_handles_on_one_base_compute_as_if_each_had_its_own(llama, llama_inputs):
    handles = [lora(llama, 1), lora(llama, 2), prompted(llama, 3)]
    alone = [lora(tiny.make("llama"), 1), lora(tiny.make("llama"), 2), prompted(tiny.make("llama"), 3)]
    for _ in range(2):  # in turns: no handle leaves anything behind for the next
        for handle, single in zip(handles, alone):
            assert torch.equal(out(handle, llama_inputs), out(single, llama_inputs))
    assert not torch.equal(out(handles[0], llama_inputs), out(handles[1], llama_inputs))


@pytest.mark.parametrize("first", MAKERS)
@pytest.mark.parametrize("second", MAKERS)
def test_base_alone_is_bit_identical_with_handles_on_it(llama, llama_inputs, first, second):
    before, plain = state(llama), out(llama, llama_inputs)
    handles = [MAKERS[first](llama, 1), MAKERS[second](llama, 2)]
    for handle in handles:
        assert not torch.equal(out(handle, llama_inputs)[:, -1], plain[:, -1])
        assert torch.equal(out(llama, llama_inputs), plain)
    assert_same_state(before, state(llama))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_attaching_changes_no_name_type_signature_or_output(name):
    base, inputs = tiny.make(name), tiny.inputs_for(name)
    before, plain = state(base), out(base, inputs)
    signatures = {path: inspect.signature(module.forward) for path, module in base.named_modules()}
    kept = lora(base, task_type=tiny.task_of(name), target_modules="all-linear", bias="all")
    assert torch.equal(out(base, inputs), plain)
    assert not torch.equal(out(kept, inputs), plain)
    assert_same_state(before, state(base))
    assert signatures == {path: inspect.signature(module.forward) for path, module in base.named_modules()}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_an_exception_inside_a_forward_leaves_nothing_behind(llama, llama_inputs, maker):
    plain, handle = out(llama, llama_inputs), maker(llama)
    expected = out(handle, llama_inputs)
    for wrong in (
        {"input_ids": torch.tensor([[10**6]])},
        {"input_ids": llama_inputs["input_ids"], "labels": torch.ones(3, 3).long()},
    ):
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            handle(**wrong)
        with pytest.raises((IndexError, ValueError, RuntimeError, TypeError)):
            handle.generate(wrong["input_ids"], max_new_tokens=1, nonsense=1)
        assert current_frame() is None
        assert torch.equal(out(llama, llama_inputs), plain)
        assert torch.equal(out(handle, llama_inputs), expected)


def test_a_refused_config_leaves_no_trace(llama):
    before = state(llama)
    flags = [p.requires_grad for p in llama.parameters()]
    with pytest.raises(TargetError):
        get_peft_model(llama, LoraConfig(target_modules=["q_proj", "nonsense"]))
    assert_same_state(before, state(llama))
    assert flags == [p.requires_grad for p in llama.parameters()]
    assert not any(site_of(module) for module in llama.modules())


def test_delete_and_unload_leave_the_base_as_it_was(llama, llama_inputs):
    before, plain = state(llama), out(llama, llama_inputs)
    dicts = {path: set(vars(module)) for path, module in llama.named_modules()}
    handle = lora(llama, bias="all", modules_to_save=["lm_head"])
    out(handle, llama_inputs)
    handle.delete_adapter("default")
    assert torch.equal(out(handle, llama_inputs), plain)
    assert handle.unload() is llama
    assert_same_state(before, state(llama))
    assert torch.equal(out(llama, llama_inputs), plain)
    assert dicts == {path: set(vars(module)) for path, module in llama.named_modules()}


def test_unloading_one_handle_leaves_the_other_working(llama, llama_inputs):
    first, second = lora(llama, 1), lora(llama, 2)
    expected = out(second, llama_inputs)
    first.unload()
    assert torch.equal(out(second, llama_inputs), expected)
    assert all(p.requires_grad for p in second.adapters.parameters())


def test_unload_restores_requires_grad_that_the_base_came_with(llama):
    llama.model.embed_tokens.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in llama.named_parameters()}
    first, second = lora(llama, 1), lora(llama, 2)
    assert not any(p.requires_grad for p in llama.parameters())
    first.unload()
    assert not any(p.requires_grad for p in llama.parameters()), "the second handle's base is still frozen"
    second.unload()
    assert flags == {name: p.requires_grad for name, p in llama.named_parameters()}


def test_attaching_does_not_refreeze_what_another_handle_trains(llama):
    first = lora(llama, 1, bias="all", modules_to_save=["lm_head"])
    trains = {name for name, p in first.named_parameters() if p.requires_grad}
    lora(llama, 2)
    prompted(llama)
    assert trains == {name for name, p in first.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_dropped_handle_is_freed_at_once(llama, llama_inputs, maker):
    handle = maker(llama)
    handle.train()(**llama_inputs, labels=llama_inputs["input_ids"]).loss.backward()
    handle.eval()
    handle.generate(llama_inputs["input_ids"], max_new_tokens=2)
    reference, tensor = weakref.ref(handle), weakref.ref(next(handle.adapters.parameters()))
    gc.disable()  # freed by counting references: no cycle holds a handle
    try:
        del handle
        assert reference() is None and tensor() is None
    finally:
        gc.enable()


def test_a_dropped_base_is_freed_at_once_with_its_sites():
    base = nn.Sequential(nn.Linear(4, 4))
    handle = lora(base, target_modules=["0"])
    handle(torch.randn(2, 4))
    references = weakref.ref(base), weakref.ref(base[0])
    gc.disable()
    try:
        del base, handle
        assert references[0]() is None and references[1]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_disable_adapter_is_exactly_the_base(llama, llama_inputs, maker):
    plain, handle = out(llama, llama_inputs), maker(llama)
    expected = out(handle, llama_inputs)
    with handle.disable_adapter():
        assert torch.equal(out(handle, llama_inputs), plain)
        with handle.disable_adapter():
            pass
        assert torch.equal(out(handle, llama_inputs), plain)
    assert torch.equal(out(handle, llama_inputs), expected)
    with pytest.raises(KeyError), handle.disable_adapter():
        raise KeyError
    assert torch.equal(out(handle, llama_inputs), expected)


def test_disable_adapter_is_exactly_the_base_when_merged(llama, llama_inputs):
    plain, handle = out(llama, llama_inputs), lora(llama, bias="all", modules_to_save=["lm_head"])
    handle.merge_adapter()
    merged = out(handle, llama_inputs)
    with handle.disable_adapter():
        assert torch.equal(out(handle, llama_inputs), plain)
    assert torch.equal(out(handle, llama_inputs), merged)


def test_threads_with_different_handles_and_the_bare_base_do_not_disturb_each_other(llama, llama_inputs):
    callers = [lora(llama, 1), lora(llama, 2), prompted(llama, 3), llama]
    expected = [out(caller, llama_inputs) for caller in callers]
    start, wrong = threading.Barrier(len(callers)), []

    def work(index):
        start.wait()
        for _ in range(8):
            if not torch.equal(out(callers[index], llama_inputs), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(callers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_handle_serves_several_threads(llama, llama_inputs):
    handle, results = lora(llama), []
    threads = [threading.Thread(target=lambda: results.append(out(handle, llama_inputs))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, out(handle, llama_inputs)) for result in results) and len(results) == 3


@pytest.mark.parametrize("how", [copy.deepcopy, lambda handle: pickle.loads(pickle.dumps(handle))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_copied_handle_works_and_is_independent(llama, llama_inputs, maker, how):
    handle = maker(llama)
    expected, plain = out(handle, llama_inputs), out(llama, llama_inputs)
    copied = how(handle)
    assert type(copied) is type(handle) and copied.bare_base is not llama
    assert torch.equal(out(copied, llama_inputs), expected)
    with torch.no_grad():
        for parameter in copied.adapters.parameters():
            parameter.add_(1)
    assert not torch.equal(out(copied, llama_inputs), expected)
    assert torch.equal(out(handle, llama_inputs), expected)
    assert torch.equal(out(copied.unload(), llama_inputs), plain)
    assert torch.equal(out(handle, llama_inputs), expected)


def test_a_copied_handle_trains(llama, llama_inputs):
    copied = copy.deepcopy(lora(llama)).train()
    copied(**llama_inputs, labels=llama_inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in copied.adapters.parameters())
    assert all(p.grad is None for p in llama.parameters())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda base: pickle.loads(pickle.dumps(base))], ids=["deepcopy", "pickle"])
def test_a_copied_base_is_a_plain_base(llama, llama_inputs, how):
    plain, handle = out(llama, llama_inputs), lora(llama, bias="all")
    _checkpoint(llama)
    handle.train()(**llama_inputs, labels=llama_inputs["input_ids"])
    copied = how(llama)
    assert type(copied) is type(llama)
    assert not any(site_of(module) for module in copied.modules())
    assert isinstance(copied.model.layers[0]._gradient_checkpointing_func, functools.partial)
    assert torch.equal(out(copied.eval(), llama_inputs), plain)
    with torch.no_grad():
        llama.lm_head.weight.add_(1)
    assert torch.equal(out(copied, llama_inputs), plain), "the copy's forwards reach the original's weights"
    assert torch.equal(out(lora(copied), llama_inputs), out(lora(tiny.make("llama")), llama_inputs)), "a base like any other"


def test_a_pickled_base_needs_no_tunesmith_to_be_read(llama, llama_inputs):
    handle = lora(llama)
    _checkpoint(llama)
    handle.train()(**llama_inputs)  # wraps the checkpointing function
    assert b"tunesmith" not in pickle.dumps(llama)


def _checkpoint(base):
    """What `gradient_checkpointing_enable` does, less its hook on the embeddings, which no pickle can hold."""
    function = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    base._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)


def test_modes_are_the_handles_and_leave_the_bases_alone(llama, llama_inputs):
    first, second = lora(llama, 1, lora_dropout=0.5), lora(llama, 2)
    expected = out(first.eval(), llama_inputs)
    second.train()
    assert not llama.training and second.base_model.training and not first.base_model.training
    out(second, llama_inputs)
    assert not any(module.training for module in llama.modules())
    assert torch.equal(out(first, llama_inputs), expected), "an eval handle stays one, whatever the others do"
    llama.train()
    assert torch.equal(out(first, llama_inputs), expected)
    assert all(module.training for module in llama.modules())


def test_dropout_of_the_base_follows_the_handles_mode():
    base, inputs = tiny.make("gpt2"), tiny.inputs_for("gpt2")
    first, second = lora(base, 1).train(), lora(base, 2).eval()
    assert torch.equal(out(second, inputs), out(second, inputs))
    assert not torch.equal(out(first, inputs), out(first, inputs))
    assert torch.equal(out(second, inputs), out(second, inputs))


def test_training_never_changes_a_base_tensor():
    base, inputs = tiny.make("bert-classifier"), tiny.inputs_for("bert-classifier")
    before = state(base)
    handle = lora(base, task_type="SEQ_CLS", bias="all", modules_to_save=["pooler"]).train()
    names = {name for name, p in handle.named_parameters() if p.requires_grad}
    assert all(name.startswith("adapters.") for name in names)
    assert any("classifier" in name for name in names) and any("pooler" in name for name in names)
    assert any("LayerNorm" in name for name in names), "norm biases are private copies, too"
    optimizer = torch.optim.AdamW([p for p in handle.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        handle(**inputs, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    assert_same_state(before, state(base))
    assert all(p.grad is None for p in base.parameters())
    shared = {p.data_ptr() for p in base.parameters()} & {p.data_ptr() for p in handle.adapters.parameters()}
    assert not shared


def test_buffers_of_private_copies_are_private():
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    base[1].eval()
    handle = lora(base, target_modules=["0"], modules_to_save=["1"]).train()
    before = base[1].running_mean.clone()
    handle(torch.randn(8, 4))
    assert torch.equal(base[1].running_mean, before)


def test_adapters_are_called_as_modules_so_that_hooks_on_them_run(llama, llama_inputs):
    handle, seen = lora(llama), []
    for path, adapter in handle.adapters["default"].items():
        adapter.register_forward_pre_hook(lambda *_, path=path: seen.append(path))
    out(handle, llama_inputs)
    assert sorted(seen) == sorted(path for path, _ in handle.adapters["default"].items())


def test_replacing_an_adapters_tensors_in_the_tree_takes_effect(llama, llama_inputs):
    """FSDP and ZeRO-3 swap parameters in place: nothing may hold on to the old ones."""
    handle = lora(llama)
    plain = out(llama, llama_inputs)
    out(handle, llama_inputs)
    for module in list(handle.adapters.modules()):
        for name, parameter in list(module._parameters.items()):
            module._parameters[name] = nn.Parameter(torch.zeros_like(parameter))
    assert torch.equal(out(handle, llama_inputs), plain)
