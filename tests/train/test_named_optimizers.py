"""Optimisers of bitsandbytes by name, on a machine without a GPU or without bitsandbytes."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers as tf

from tests import tiny
from tunesmith import ConfigError, LoraConfig, Trainer, get_peft_model
from tunesmith.train.named_optimizers import OF_BITSANDBYTES, UNPAGED, usable_optimizer

INPUTS = tiny.inputs_for("llama")
ROWS = [{"input_ids": row, "labels": row} for row in INPUTS["input_ids"]] * 2


def trained(folder, optim):
    torch.manual_seed(0)
    handle = get_peft_model(tiny.make("llama"), LoraConfig(r=2, task_type="CAUSAL_LM"))
    arguments = tf.TrainingArguments(
        folder,
        optim=optim,
        max_steps=3,
        report_to="none",
        use_cpu=True,
        learning_rate=1e-2,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(handle, arguments, train_dataset=ROWS)
    trainer.train()
    return trainer, {name: p.detach().clone() for name, p in handle.adapters.named_parameters()}


def test_every_name_is_one_that_transformers_knows():
    known = {each.value for each in tf.training_args.OptimizerNames}
    assert known >= OF_BITSANDBYTES | set(UNPAGED.values())
    assert {name for name in known if "paged" in name} == set(UNPAGED)


def test_others_are_left_alone(caplog):
    for name in ("adamw_torch", "sgd", "adafactor"):
        assert usable_optimizer(name, "cpu") == name
    for name in UNPAGED:
        assert usable_optimizer(name, "cuda") == name
    assert not caplog.text


@pytest.mark.parametrize("name", UNPAGED)
def test_paged_ones_do_not_page_on_a_cpu_and_say_so(name, caplog):
    pytest.importorskip("bitsandbytes")
    assert usable_optimizer(name, "cpu") == UNPAGED[name]
    assert name in caplog.text and UNPAGED[name] in caplog.text


def test_without_bitsandbytes(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert usable_optimizer("paged_adamw_8bit", "cuda") == usable_optimizer("adamw_8bit", "cpu") == "adamw_torch"
    assert "not installed" in caplog.text
    with pytest.raises(ConfigError, match=r'optim="lion_8bit" needs bitsandbytes; pip install "tunesmith\[quant\]"'):
        usable_optimizer("lion_8bit", "cpu")


def test_a_job_with_the_usual_paged_optimiser_trains_as_with_torchs(tmp_path):
    _, expected = trained(tmp_path, "adamw_torch")
    trainer, found = trained(tmp_path, "paged_adamw_32bit")
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "adamw_torch"])
def test_the_users_arguments_stay_as_they_were_made(optim, tmp_path):
    trainer, _ = trained(tmp_path, optim)
    assert trainer.args.optim == tf.training_args.OptimizerNames(optim)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)


def test_an_8_bit_optimiser_trains_nearly_as_torchs(tmp_path):
    """Its states are 32 bits wide below 4,096 numbers, so here the arithmetic is the same."""
    bnb = pytest.importorskip("bitsandbytes")
    _, expected = trained(tmp_path, "adamw_torch")
    trainer, found = trained(tmp_path, "paged_adamw_8bit")
    assert isinstance(trainer.optimizer.optimizer, bnb.optim.AdamW)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
