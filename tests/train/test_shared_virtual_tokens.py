"""Virtual tokens that run once for all rows."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import tiny
from tests.train.test_fused_loss import batch_for, both
from tunesmith import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tunesmith.train import shared_virtual_tokens

CAUSAL = [name for name in tiny.GENERATING if tiny.task_of(name) == "CAUSAL_LM"]
VIRTUAL = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
}


@pytest.mark.parametrize("config", VIRTUAL)
@pytest.mark.parametrize("name", CAUSAL)
def test_virtual_tokens_run_once_for_all_rows_with_the_same_loss_and_gradients(name, config, monkeypatch):
    """Padded at the right; with padding at the left, every row has them behind its own."""
    base, runs = tiny.make(name), []
    handle, batch = get_peft_model(base, copy.deepcopy(VIRTUAL[config])).eval(), batch_for(name)
    monkeypatch.setattr(shared_virtual_tokens, "PASS", 0)
    monkeypatch.setattr(shared_virtual_tokens, "WORTH", 1)
    run = shared_virtual_tokens.run
    monkeypatch.setattr(shared_virtual_tokens, "run", lambda *given: runs.append(1) or run(*given))
    both(handle, batch)
    assert not runs
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, -2:] = 0
    batch["labels"][1, -2:] = -100
    (own, own_gradients), (fused, gradients) = both(handle, batch)
    assert len(runs) == 2
    torch.testing.assert_close(fused, own, rtol=1e-5, atol=0)
    scale = max(gradient.abs().max().item() for gradient in own_gradients)
    for found, expected in zip(gradients, own_gradients):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale)


def test_virtual_tokens_are_shared_where_that_saves_more_than_another_pass_over_the_weights():
    handle = get_peft_model(tiny.make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30)).train()
    batch = {"input_ids": torch.ones(4, 5, dtype=torch.long)}
    assert shared_virtual_tokens.applies(handle, handle.effective_frame, batch)
    assert not shared_virtual_tokens.applies(handle, handle.effective_frame, {"input_ids": batch["input_ids"][:2]})
    assert not shared_virtual_tokens.applies(
        handle, handle.effective_frame, {**batch, "attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 4)}
    )
    handle.gradient_checkpointing_enable()
    assert not shared_virtual_tokens.applies(handle, handle.effective_frame, batch)
