"""`prepare_model_for_kbit_training` and loading adapters with their quantised bases, as scripts written for peft call them."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from tests import quantised, tiny
from tests.handles import out
from tests.methods.test_contract_quantised import INPUTS, LABELLED, each_form, randomised, with_the_same_adapter
from tunesmith import AutoPeftModelForCausalLM, LoraConfig, UsageError, get_peft_model, prepare_model_for_kbit_training
from tunesmith.bases.quantised import quantised_views

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def types(model):
    return {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.each_value_once
@each_form
@pytest.mark.parametrize("kwargs", [{}, {"use_gradient_checkpointing": False},
                                    {"gradient_checkpointing_kwargs": {"use_reentrant": False}}], ids=str)  # fmt: skip
def test_does_to_a_base_what_peft_does(form, kwargs, tmp_path):
    import peft

    ours, theirs = (quantised.make(tmp_path, form, dtype=torch.bfloat16, compute=torch.bfloat16) for _ in range(2))
    assert prepare_model_for_kbit_training(ours, **kwargs) is ours
    peft.prepare_model_for_kbit_training(theirs, **kwargs)
    assert types(ours) == types(theirs)
    assert ours.is_gradient_checkpointing == theirs.is_gradient_checkpointing
    for one, other in zip(ours.modules(), theirs.modules()):
        assert len(one._forward_hooks) == len(other._forward_hooks)
    assert torch.equal(ours.train()(**INPUTS).logits, theirs.train()(**INPUTS).logits)


def test_a_dense_base_is_widened_and_frozen_but_not_checkpointed():
    base = prepare_model_for_kbit_training(tiny.make("llama").to(torch.bfloat16))
    assert set(types(base).values()) == {(torch.float32, False)} and not base.is_gradient_checkpointing


@pytest.mark.each_value_once
@each_form
@pytest.mark.parametrize("reentrant", [True, False, None])
def test_the_usual_recipe_trains_every_adapter(form, reentrant, tmp_path):
    """Also without anything said about reentrance, which checkpoints reentrantly and needs inputs with a gradient."""
    kwargs = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    base = quantised.make(tmp_path, form, dtype=torch.bfloat16, compute=torch.bfloat16)
    dense_base = quantised.dense_copy(base)
    before = quantised.stored(prepare_model_for_kbit_training(base, **kwargs))
    handle = randomised(base, LoraConfig(**LORA)).train()
    dense = with_the_same_adapter(handle, dense_base, LoraConfig(**LORA)).train()
    found, expected = losses_of_training(handle), losses_of_training(dense)
    assert expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, rel=0.02)  # bf16 products against fp32, over the whole way
    quantised.assert_same_stored(quantised.stored(base), before)


def losses_of_training(handle, steps=20) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in handle.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = handle(**LABELLED).loss
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.adapters.parameters())
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_not_widening_leaves_every_type(tmp_path):
    base = quantised.make(tmp_path, "nf4", dtype=torch.bfloat16)
    before = {name: p.dtype for name, p in base.named_parameters()}
    prepare_model_for_kbit_training(base, widen=False)
    assert {name: p.dtype for name, p in base.named_parameters()} == before and base.is_gradient_checkpointing


def test_a_handle_is_refused_before_its_adapters_are_frozen():
    handle = get_peft_model(tiny.make("llama"), LoraConfig(**LORA))
    with pytest.raises(UsageError, match="before get_peft_model"):
        prepare_model_for_kbit_training(handle)
    assert all(p.requires_grad for p in handle.adapters.parameters())


@each_form
def test_an_adapter_loads_with_its_base_quantised(form, tmp_path):
    quantised.wide().save_pretrained(tmp_path / "base")
    handle = randomised(quantised.load(tmp_path / "base", form), LoraConfig(**LORA)).eval()
    handle.save_pretrained(tmp_path / "adapter")
    fields = dict(quantised.FORMS[form])
    config = tf.BitsAndBytesConfig(**fields, **({"bnb_4bit_compute_dtype": torch.float32} if "load_in_4bit" in fields else {}))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", quantization_config=config)
    assert sum(1 for _ in quantised_views(again.bare_base)) == 14
    assert torch.equal(out(again.eval(), INPUTS), out(handle, INPUTS))
    merged = again.merge_and_unload()
    torch.testing.assert_close(out(merged, INPUTS), out(handle, INPUTS), rtol=1e-4, atol=1e-4)


@each_form
def test_peft_reads_our_adapter_and_computes_the_same(form, tmp_path):
    import peft

    base = quantised.make(tmp_path, form)
    handle = randomised(base, LoraConfig(**LORA)).train()
    handle.save_pretrained(tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(quantised.make(tmp_path, form), tmp_path / "adapter").train()
    torch.testing.assert_close(handle(**INPUTS).logits, other(**INPUTS).logits, rtol=1e-4, atol=1e-4)
    assert handle.get_nb_trainable_parameters()[1] == other.get_nb_trainable_parameters()[1]
    other.save_pretrained(tmp_path / "theirs")
    from tunesmith import PeftModel

    again = PeftModel.from_pretrained(quantised.make(tmp_path, form), tmp_path / "theirs").eval()
    assert torch.equal(out(again, INPUTS), out(handle.eval(), INPUTS))


@each_form
def test_transformers_trainer_takes_the_handle(form, tmp_path):
    """Its gate for quantised models, its checkpoints of the adapter only, and resuming nothing of the base."""
    base = quantised.make(tmp_path, form, dtype=torch.bfloat16, compute=torch.bfloat16)
    handle = randomised(prepare_model_for_kbit_training(base), LoraConfig(**LORA))
    rows = [{"input_ids": row, "labels": row} for row in INPUTS["input_ids"]] * 4
    arguments = tf.TrainingArguments(
        tmp_path / "out", max_steps=3, per_device_train_batch_size=2, report_to="none", use_cpu=True, logging_steps=1,
        save_steps=3, learning_rate=1e-2, disable_tqdm=True, max_grad_norm=0.3, lr_scheduler_type="cosine", warmup_steps=0.03,
    )  # fmt: skip
    before = quantised.stored(base)
    trainer = tf.Trainer(handle, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    files = {path.name for path in (tmp_path / "out" / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    quantised.assert_same_stored(quantised.stored(base), before)
