"""Frames end with their calls, and adapters compute beside a base of any type (rules 1, 6, 10)."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.handles import lora, out, prompted
from tunesmith import LoraConfig, UsageError, get_peft_model
from tunesmith.runtime.frame import Frame, current_frame, entered

# --- frames ------------------------------------------------------------------------------------------------------


def test_a_frame_ends_with_its_call_also_by_an_exception(llama, llama_inputs):
    handle = lora(llama)
    calls = [
        lambda: handle(input_ids="nonsense"),
        lambda: handle.generate("nonsense"),
        lambda: handle.get_decoder()("nonsense"),
        lambda: handle.prepare_inputs_for_generation(),
        lambda: handle.train()(input_ids="nonsense"),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError, AttributeError)):
            call()
        assert current_frame() is None


def test_an_interrupt_inside_a_module_ends_the_frame(llama, llama_inputs):
    handle = lora(llama)

    def interrupt(*_):
        assert current_frame() is not None
        raise KeyboardInterrupt

    hook = llama.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        handle(**llama_inputs)
    hook.remove()
    assert current_frame() is None


def test_a_handle_called_inside_another_ones_call_restores_the_outer_frame(llama, llama_inputs):
    outer, inner = lora(llama, 1), lora(llama, 2)
    expected_outer, expected_inner = out(outer, llama_inputs), out(inner, llama_inputs)
    plain, seen = out(llama, llama_inputs), []
    depth = threading.local()

    def between_layers(*_):
        if getattr(depth, "inside", False):
            return
        depth.inside = True
        seen.append(out(inner, llama_inputs))
        with inner.disable_adapter():
            seen.append(out(inner, llama_inputs))
        depth.inside = False

    hook = llama.model.layers[1].register_forward_pre_hook(between_layers)
    found = out(outer, llama_inputs)
    hook.remove()
    assert torch.equal(found, expected_outer)
    assert torch.equal(seen[0], expected_inner) and torch.equal(seen[1], plain)


def test_a_bare_frame_nests_and_a_none_frame_is_the_base(llama, llama_inputs):
    handle, plain = lora(llama), out(llama, llama_inputs)
    with handle.entered() as frame:
        assert current_frame() is frame
        assert torch.equal(out(llama, llama_inputs), out(handle, llama_inputs))
        with entered(None):
            assert torch.equal(out(llama, llama_inputs), plain)
        with entered(Frame({})):
            assert torch.equal(out(llama, llama_inputs), plain)
        assert current_frame() is frame
    assert current_frame() is None


def test_a_frame_is_not_seen_by_other_threads(llama, llama_inputs):
    handle, plain, seen = lora(llama), out(llama, llama_inputs), []
    with handle.entered():
        thread = threading.Thread(target=lambda: seen.append(out(llama, llama_inputs)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], plain)


# --- inputs, outputs and dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_neither_the_input_nor_the_bases_output_is_modified(grad):
    """The base's output may be held by somebody else: a hook, a cache, a view."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handle = lora(base, target_modules=["0", "1"], lora_dropout=0.5).train()
    x, outputs = torch.randn(3, 4), []
    kept = x.clone()
    plain_linear = F.linear

    def spying(*args, **kwargs):
        result = plain_linear(*args, **kwargs)
        outputs.append((result, result.detach().clone()))
        return result

    torch.nn.functional.linear, torch.nn.modules.linear.F.linear = spying, spying
    try:
        with torch.set_grad_enabled(grad):
            handle(x)
    finally:
        torch.nn.functional.linear = torch.nn.modules.linear.F.linear = plain_linear
    assert torch.equal(x, kept) and len(outputs) >= 2
    assert all(torch.equal(result, at_first) for result, at_first in outputs)


def test_an_output_that_is_the_input_is_not_modified():
    """A module may return what it was given."""

    class Same(nn.Linear):
        def forward(self, x):
            return x

    base = nn.Sequential(Same(4, 4))
    handle, x = lora(base, target_modules=["0"]), torch.randn(2, 4)
    kept = x.clone()
    assert not torch.equal(handle(x), kept)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("maker", [lora, prompted])
def test_under_autocast_a_handle_computes_in_the_autocast_type(llama, llama_inputs, maker):
    handle = maker(llama)
    with torch.autocast("cpu", torch.bfloat16):
        plain = out(llama, llama_inputs)
        found = out(handle, llama_inputs)
    assert found.dtype == plain.dtype
    torch.testing.assert_close(found.float(), out(handle, llama_inputs), rtol=0.05, atol=0.05)


def test_training_under_autocast_gives_gradients_in_the_adapters_type(llama, llama_inputs):
    handle = lora(llama).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = handle(**llama_inputs, labels=llama_inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in handle.adapters.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_keeps_its_type_beside_fp32_adapters(llama, llama_inputs, dtype):
    base = llama.to(dtype)
    handle = lora(base)
    assert all(p.dtype == torch.float32 for p in handle.adapters.parameters())
    assert out(handle, llama_inputs).dtype == dtype
    own = get_peft_model(base, LoraConfig(), autocast_adapter_dtype=False)
    assert all(p.dtype == dtype for p in own.adapters.parameters())


# --- modules under adapters ------------------------------------------------------------------------------------------


def test_a_base_module_replaced_under_its_adapter_is_an_error(llama, llama_inputs):
    """Otherwise the adapter would silently stop acting."""
    handle = lora(llama, target_modules=["q_proj"])
    handle(**llama_inputs)
    llama.model.layers[0].self_attn.q_proj = copy.deepcopy(llama.model.layers[0].self_attn.q_proj)
    with pytest.raises(UsageError, match=r"modules under adapters \(default\) were replaced on the base"):
        handle(**llama_inputs)
    with handle.disable_adapter():
        assert handle(**llama_inputs).logits.isfinite().all()
