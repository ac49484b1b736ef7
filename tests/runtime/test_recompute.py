"""Gradient checkpointing recomputes layers under the frame of their forward pass (rule 3)."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests import tiny
from tests.handles import MAKERS as HANDLES
from tests.handles import assert_same_gradients, gradients, lora, out, prefixed
from tunesmith.runtime.frame import current_frame

MODELS = {
    "lora": ["llama", "gpt2", "t5", "bert-tagger"],
    "prompt": ["llama", "gpt2", "bert-tagger"],
    "prefix": ["llama", "gpt2", "opt", "bloom", "t5", "bert-tagger", "llama-classifier"],
    "projected prefix": ["llama", "t5", "bert-tagger"],
}
MAKERS = {**HANDLES, "projected prefix": functools.partial(prefixed, prefix_projection=True)}
EXACT = {"rtol": 1e-9, "atol": 1e-14}  # float64, sums of some thousand terms
CASES = [(method, name) for method, names in MODELS.items() for name in names]


def _base(name):
    """Without dropout, which the runs that are compared would draw differently."""
    base = tiny.make(name)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return base


def _on(base, method, name):
    """In float64: checkpointing makes attention choose other kernels and adds in another order."""
    handle = MAKERS[method](base, **{"task_type" if method == "lora" else "task": tiny.task_of(name)}).train()
    handle.adapters.double()
    return handle


def _handle(method, name):
    return _on(_base(name).double(), method, name)


def _step(handle, name):
    """Loss and adapter gradients of one training step."""
    inputs = tiny.inputs_for(name)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    inputs["labels"] = {"TOKEN_CLS": labels % 3, "SEQ_CLS": labels[:, 0] % 3}.get(tiny.task_of(name), labels)
    inputs.pop("decoder_input_ids", None)
    handle.zero_grad(set_to_none=True)
    loss = handle(**inputs).loss
    assert current_frame() is None
    loss.backward()
    assert current_frame() is None
    return loss.detach(), gradients(handle)


def _counted(model):
    """Wrap the checkpointing functions of `model` to count their calls."""
    calls = []
    for module in model.modules():
        inner = getattr(module, "_gradient_checkpointing_func", None)
        if inner is not None:

            def counting(*args, inner=inner, **kwargs):
                calls.append(1)
                return inner(*args, **kwargs)

            module._gradient_checkpointing_func = functools.update_wrapper(functools.partial(counting, **inner.keywords), inner)
    return calls


@pytest.mark.each_value_once
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("where", ["handle", "base"])
@pytest.mark.parametrize("method,name", CASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_loss_and_every_gradient_equal_those_without(method, name, where, reentrant):
    loss, expected = _step(_handle(method, name), name)
    handle = _handle(method, name)
    target = handle if where == "handle" else handle.bare_base
    tiny.enable_recomputing(target, {"use_reentrant": reentrant})
    calls = _counted(handle.base_model)
    found_loss, found = _step(handle, name)
    assert calls, "nothing was checkpointed"
    torch.testing.assert_close(found_loss, loss, **EXACT)
    assert_same_gradients(found, expected, **EXACT)


@pytest.mark.each_value_once
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("when", ["before the handle", "after it", "through its view"])
@pytest.mark.parametrize("method,name", CASES)
def test_checkpointing_of_the_bare_base_carries_the_adapters_and_leaves_it_bare(method, name, when, reentrant):
    expected = _step(_handle(method, name), name)[1]
    base, inputs = _base(name).double(), tiny.inputs_for(name)
    plain = out(base, inputs)
    if when == "before the handle":
        tiny.enable_recomputing(base, {"use_reentrant": reentrant})
    handle = _on(base, method, name)
    if when != "before the handle":
        tiny.enable_recomputing(base if when == "after it" else handle.get_base_model(), {"use_reentrant": reentrant})
    assert_same_gradients(_step(handle, name)[1], expected, **EXACT)
    assert torch.equal(out(base.eval(), inputs), plain)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_without_the_hook_on_embeddings(reentrant):
    """`_set_gradient_checkpointing` alone marks no input: reentrant checkpointing then needs our own mark."""
    loss, expected = _step(_handle("lora", "llama"), "llama")
    handle = _handle("lora", "llama")
    function = functools.partial(checkpoint, use_reentrant=reentrant)
    handle.bare_base._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    found_loss, found = _step(handle, "llama")
    torch.testing.assert_close(found_loss, loss, **EXACT)
    assert_same_gradients(found, expected, **EXACT)


def test_marking_an_input_for_reentrant_checkpointing_leaves_the_users_tensor_alone():
    handle = _handle("lora", "llama")
    function = functools.partial(checkpoint, use_reentrant=True)
    handle.bare_base._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    embeds = torch.randn(2, 5, 32).double()
    handle(inputs_embeds=embeds).logits.sum().backward()
    assert not embeds.requires_grad and embeds.grad is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_deprecated_name_works_and_can_be_switched_off():
    loss, expected = _step(_handle("lora", "llama"), "llama")
    handle = _handle("lora", "llama")
    assert handle.supports_gradient_checkpointing and not handle.is_gradient_checkpointing
    handle.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert handle.is_gradient_checkpointing and not handle.bare_base.is_gradient_checkpointing
    found_loss, found = _step(handle, "llama")
    torch.testing.assert_close(found_loss, loss, **EXACT)
    assert_same_gradients(found, expected, **EXACT)
    handle.gradient_checkpointing_disable()
    assert not handle.is_gradient_checkpointing
    assert_same_gradients(_step(handle, "llama")[1], expected, **EXACT)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_two_handles_recompute_with_their_own_adapters(reentrant):
    """Both forwards come before both backwards, which run in the other order."""
    expected = [_step(lora(tiny.make("llama").double(), seed).train(), "llama")[1] for seed in (1, 2)]
    base, inputs = tiny.make("llama").double(), tiny.inputs_for("llama")
    handles = [lora(base, seed).train() for seed in (1, 2)]
    tiny.enable_recomputing(base, {"use_reentrant": reentrant})
    losses = [handle(**inputs, labels=inputs["input_ids"]).loss for handle in handles]
    for loss in reversed(losses):
        loss.backward()
    for handle, gradient in zip(handles, expected):
        assert_same_gradients(gradients(handle), gradient, **EXACT)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_backward_on_another_thread_recomputes_with_the_adapters(reentrant):
    expected = _step(_handle("lora", "llama"), "llama")[1]
    handle, inputs = _handle("lora", "llama"), tiny.inputs_for("llama")
    tiny.enable_recomputing(handle, {"use_reentrant": reentrant})
    loss = handle(**inputs, labels=inputs["input_ids"]).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_same_gradients(gradients(handle), expected, **EXACT)


def test_backward_under_another_handles_frame_recomputes_with_the_own_adapters():
    expected = _step(lora(tiny.make("llama").double(), 1).train(), "llama")[1]
    base, inputs = tiny.make("llama").double(), tiny.inputs_for("llama")
    handle, other = lora(base, 1).train(), lora(base, 2).train()
    tiny.enable_recomputing(base, {"use_reentrant": False})
    loss = handle(**inputs, labels=inputs["input_ids"]).loss
    with other.entered():
        loss.backward()
    assert_same_gradients(gradients(handle), expected, **EXACT)


def test_the_base_alone_still_checkpoints_as_before():
    base, inputs = tiny.make("llama").train(), tiny.inputs_for("llama")
    base(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = {name: p.grad.clone() for name, p in base.named_parameters()}
    base.zero_grad()
    handle = lora(base)
    tiny.enable_recomputing(base, {"use_reentrant": False})
    handle.train()(**inputs)
    handle.unload()
    base(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("method", MAKERS)
def test_transformers_trainer_with_gradient_checkpointing(tmp_path, method):
    import transformers

    losses, finals = [], []
    for checkpointing in (False, True):
        handle = _handle(method, "llama")
        inputs = tiny.inputs_for("llama", rows=4)
        rows = [{"input_ids": ids, "labels": ids} for ids in inputs["input_ids"]]
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
            gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": True}, use_cpu=True,
            disable_tqdm=True, optim="sgd",
        )  # fmt: skip
        trainer = transformers.Trainer(handle, arguments, train_dataset=rows)
        losses.append(trainer.train().training_loss)
        finals.append({name: p.detach() for name, p in handle.adapters.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, **EXACT)
