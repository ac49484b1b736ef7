"""No adapter is passed by in silence: the check of the first step (rule 5), and resizing under adapters (rule 12)."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import tiny
from tests.handles import lora, out, prompted
from tunesmith import BottleneckConfig, LoraConfig, TargetError, UsageError, get_peft_model


class KeepsWeight(nn.Module):
    """A block that keeps one projection's weight in a place of its own, as a fused kernel might."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.kept = [self.proj.weight]

    def forward(self, x):
        return self.other(F.linear(x, *self.kept))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.linear(x)
        return self.attention(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """A router that uses the first expert only."""

    def __init__(self, block=False):
        super().__init__()
        self.gate = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])

    def forward(self, x):
        return self.experts[0](self.gate(x))


def test_a_weight_kept_elsewhere_raises_in_the_first_step():
    handle = lora(nn.Sequential(KeepsWeight()), target_modules=["proj", "other"]).train()
    with pytest.raises(UsageError, match=r"(?s)keeps them elsewhere.*0\.proj"):
        handle(torch.randn(2, 4))
    with pytest.raises(UsageError, match=r"0\.proj"):
        handle(torch.randn(2, 4))  # still so: the check is due until it passes


def test_only_the_module_that_was_passed_by_is_named():
    handle = lora(nn.Sequential(KeepsWeight()), target_modules=["proj", "other"]).train()
    with pytest.raises(UsageError) as caught:
        handle(torch.randn(2, 4))
    assert "0.other" not in str(caught.value)


def test_a_part_that_is_read_rather_than_called_has_acted(caplog):
    handle = lora(Attention(), target_modules=["linear", "out_proj"]).train()
    with caplog.at_level(logging.WARNING, logger="tunesmith"):
        handle(torch.randn(2, 3, 8)).sum().backward()
    assert not caplog.text
    assert all(p.grad is not None for p in handle.parameters() if p.requires_grad)


def test_a_prompt_only_handle_and_frozen_adapters_pass(llama, llama_inputs):
    prompted(llama).train()(**llama_inputs)
    handle = lora(llama).train()
    with handle.disable_adapter():
        handle(**llama_inputs)
    handle(**llama_inputs)


def test_a_forward_replaced_after_attaching_raises_in_the_first_step(llama, llama_inputs):
    handle = lora(llama).train()
    llama.model.layers[1].self_attn.v_proj.forward = lambda x: x[..., :16]
    with pytest.raises(UsageError, match=r"(?s)replaced after.*model\.layers\.1\.self_attn\.v_proj"):
        handle(**llama_inputs)


def test_a_deleted_site_raises_in_the_first_step(llama, llama_inputs):
    handle = lora(llama).train()
    del llama.model.layers[0].self_attn.q_proj.__dict__["forward"]
    with pytest.raises(UsageError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        handle(**llama_inputs)


def test_a_replaced_module_raises_in_the_first_step(llama, llama_inputs):
    handle = lora(llama).train()
    llama.model.layers[0].self_attn.q_proj = nn.Linear(32, 32, bias=False)
    with pytest.raises(UsageError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        handle(**llama_inputs)


def test_a_parent_that_no_longer_calls_its_child_acts_or_raises(llama, llama_inputs):
    """A fused kernel patched over the block: it reads its children's weights, or has kept one."""
    handle = lora(llama, target_modules=["gate_proj", "q_proj"]).eval()
    mlp, expected = llama.model.layers[0].mlp, out(handle, llama_inputs)
    gate = mlp.gate_proj.weight
    mlp.forward = lambda x: F.linear(F.silu(F.linear(x, mlp.gate_proj.weight)) * mlp.up_proj(x), mlp.down_proj.weight)
    torch.testing.assert_close(out(handle, llama_inputs), expected, atol=1e-5, rtol=1e-5)
    mlp.forward = lambda x: F.linear(F.silu(F.linear(x, gate)) * mlp.up_proj(x), mlp.down_proj.weight)
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp\.gate_proj"):
        handle.train()(**llama_inputs)


def test_optional_parts_that_got_no_input_only_warn(caplog):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.audio = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, text, audio=None):
            return self.text(text) if audio is None else self.text(text) + self.audio(audio)

    handle = lora(Parts(), target_modules=["text", "audio"]).train()
    with caplog.at_level(logging.WARNING, logger="tunesmith"):
        handle(torch.randn(2, 4)).sum().backward()
    assert "1 of 2 adapted modules did not run in the first step (unused parts): audio" in caplog.text


def test_embeddings_given_in_place_of_ids_only_warn(llama, llama_inputs, caplog):
    handle = lora(llama, target_modules=["embed_tokens", "q_proj"]).train()
    embeds = llama.get_input_embeddings()(llama_inputs["input_ids"])
    with caplog.at_level(logging.WARNING, logger="tunesmith"):
        handle(inputs_embeds=embeds, labels=llama_inputs["input_ids"]).loss.backward()
    assert "model.embed_tokens" in caplog.text


def test_layers_compiled_in_place_are_not_observed(llama, llama_inputs):
    handle = lora(llama).eval()
    handle.add_adapter("second", LoraConfig(init_lora_weights=False))
    expected = {}
    for name in ("default", "second"):
        handle.set_adapter(name)
        expected[name] = out(handle, llama_inputs)
    handle._forget()
    compiled = []
    for layer in llama.model.layers:
        layer.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    for name in ("default", "second", "default"):
        handle.set_adapter(name)
        torch.testing.assert_close(out(handle, llama_inputs), expected[name], atol=1e-5, rtol=1e-5)
    assert len(compiled) == 2 * len(llama.model.layers)


def test_generation_is_checked_too(llama, llama_inputs):
    handle = lora(llama, target_modules=["q_proj"]).eval()
    attention = llama.model.layers[0].self_attn
    kept, forward = attention.q_proj.weight, attention.forward

    class Kept(nn.Module):
        def forward(self, x):
            return F.linear(x, kept)

    def patched(*args, **kwargs):
        own, attention._modules["q_proj"] = attention._modules["q_proj"], Kept()
        try:
            return forward(*args, **kwargs)
        finally:
            attention._modules["q_proj"] = own

    attention.forward = patched
    with pytest.raises(UsageError, match=r"layers\.0\.self_attn\.q_proj"):
        handle.generate(llama_inputs["input_ids"], max_new_tokens=2)


def test_unused_experts_only_warn(caplog):
    handle = lora(Experts(), target_modules="all-linear").train()
    with caplog.at_level(logging.WARNING, logger="tunesmith"):
        handle(torch.randn(2, 4)).sum().backward()
    assert "2 of 4 adapted modules did not run" in caplog.text
    caplog.clear()
    handle(torch.randn(2, 4))
    assert not caplog.text, "said once"


def test_when_no_adapter_is_reached_it_raises_even_without_a_parent_that_ran():
    base = Experts()
    handle = lora(base, target_modules=["experts.1.0", "experts.2.0"]).train()
    with pytest.raises(UsageError, match=r"experts\.1\.0"):
        handle(torch.randn(2, 4))


def test_the_check_leaves_no_hooks_and_runs_once(llama, llama_inputs):
    handle = lora(llama).train()
    handle(**llama_inputs)
    assert not any(module._forward_pre_hooks for module in llama.modules())
    assert not handle.is_due(handle.effective_frame)
    assert handle.eval().is_due(handle.effective_frame) and not handle.train().is_due(handle.effective_frame)
    handle.add_adapter("second", LoraConfig())
    assert handle.is_due(handle.effective_frame), "a new adapter is checked, too"


def test_an_adapter_that_is_passed_by_raises_in_inference_too():
    handle = lora(nn.Sequential(KeepsWeight()), target_modules=["proj", "other"]).eval()
    with pytest.raises(UsageError, match=r"0\.proj"), torch.no_grad():
        handle(torch.randn(2, 4))


def test_switching_to_an_adapter_that_is_passed_by_raises():
    handle = lora(nn.Sequential(KeepsWeight()), target_modules=["other"]).train()
    handle.add_adapter("second", LoraConfig(target_modules=["proj"]))
    handle(torch.randn(2, 4))
    handle.set_adapter("second")
    with pytest.raises(UsageError, match=r"0\.proj"):
        handle(torch.randn(2, 4))


def test_the_fused_inference_path_of_torchs_encoder_layer_cannot_pass_adapters_by():
    """In eval mode without gradients `nn.TransformerEncoderLayer` reads `linear1.weight`, which tells of no bottleneck."""
    base, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
    with pytest.raises(TargetError, match="linear1: its fast inference path"):
        get_peft_model(base, BottleneckConfig(target_modules=["linear1"]))
    handle = lora(base, target_modules=["linear1"])
    with torch.no_grad():
        assert not torch.allclose(handle(x), base(x), atol=1e-2)


# --- resizing under adapters -----------------------------------------------------------------------------------


def test_resizing_the_vocabulary_under_an_adapter_on_it_is_refused(llama, llama_inputs):
    for fields in (
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ):
        handle = lora(llama, **fields)
        expected = out(handle, llama_inputs)
        with pytest.raises(UsageError, match=r"lm_head|embed_tokens"):
            handle.resize_token_embeddings(tiny.VOCAB + 8)
        assert torch.equal(out(handle, llama_inputs), expected)
        handle.unload()


def test_resizing_under_another_handles_adapter_is_refused(llama, llama_inputs):
    head, handle = lora(llama, 1, target_modules=["lm_head"]), lora(llama, 2)
    with pytest.raises(UsageError, match="lm_head"):
        handle.resize_token_embeddings(tiny.VOCAB + 8)
    assert torch.equal(out(head, llama_inputs), out(lora(tiny.make("llama"), 1, target_modules=["lm_head"]), llama_inputs))


def test_resizing_elsewhere_works_and_trains_no_base_tensor(llama, llama_inputs):
    handle, soft = lora(llama), prompted(llama)
    handle.resize_token_embeddings(tiny.VOCAB + 8)
    assert out(handle, llama_inputs).shape[-1] == out(soft, llama_inputs).shape[-1] == tiny.VOCAB + 8
    assert not any(p.requires_grad for p in llama.parameters())
    handle.train()(**llama_inputs, labels=llama_inputs["input_ids"]).loss.backward()
