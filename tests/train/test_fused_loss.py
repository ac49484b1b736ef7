"""The loss on live labels against the model's own, values and gradients, and where it must not be taken."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers as tf
from transformers.trainer_pt_utils import LabelSmoother

from tests import tiny
from tests.handles import lora, prompted
from tunesmith import PrefixTuningConfig, Trainer, get_peft_model
from tunesmith.train.fused_loss import FusedLoss, HeadLoss


def batch_for(name: str) -> dict[str, torch.Tensor]:
    """Left- and right-padded rows with some labels ignored, one row with none."""
    inputs = tiny.inputs_for(name, rows=4)
    labels = inputs.pop("decoder_input_ids", inputs["input_ids"]).clone()
    inputs["attention_mask"][0, :2] = 0
    labels[0, :3] = -100
    labels[1, ::2] = -100
    labels[2] = -100
    return {**inputs, "labels": labels}


def prefixed(model, task="CAUSAL_LM"):
    return get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=3))


MAKERS = {
    "lora": lambda model, task: lora(model, task_type=task),
    "prompt": lambda model, task: prompted(model, task=task),
    "prefix": prefixed,
}


def both(handle, batch, **options):
    """`(loss, gradients)` of the model's own way and of the fused one."""
    results = []
    for compute in (lambda: handle(**batch).loss, lambda: FusedLoss(handle)(batch, **options)):
        handle.zero_grad()
        torch.manual_seed(1)  # some bases drop out
        loss = compute()
        assert loss is not None
        torch.manual_seed(1)
        loss = compute()
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in handle.adapters.parameters()]))
    return results


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", tiny.GENERATING)
def test_equals_the_models_own_loss_and_gradients(name, maker):
    handle = MAKERS[maker](tiny.make(name), tiny.task_of(name)).eval()  # no dropout; gradients all the same
    (own, own_gradients), (fused, gradients) = both(handle, batch_for(name))
    torch.testing.assert_close(fused, own, rtol=1e-5, atol=0)
    scale = max(gradient.abs().max().item() for gradient in own_gradients)
    for found, expected in zip(gradients, own_gradients):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale)


def test_items_divide_the_sum_and_smoothing_is_the_papers():
    handle, batch = lora(tiny.make("llama")).eval(), batch_for("llama")
    live = FusedLoss(handle)
    labels = batch["labels"][:, 1:]
    count = int((labels != -100).sum())
    torch.testing.assert_close(live(batch, items=torch.tensor(50)) * 50 / count, live(batch))
    logits = handle(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(live(batch, smoothing=0.1), expected)


def test_does_not_apply_to_heads_that_are_trained_adapted_or_more_than_a_matrix():
    batch = batch_for("llama")
    for targets in (["lm_head", "q_proj"], "all-linear"):
        handle = lora(tiny.make("llama"), target_modules=targets).eval()
        assert (FusedLoss(handle)(batch) is None) == (targets != "all-linear")
    copied = lora(tiny.make("llama"), modules_to_save=["lm_head"]).eval()
    assert FusedLoss(copied)(batch) is None
    mixed = lora(tiny.make("llama")).eval()
    assert FusedLoss(mixed)({**batch, "adapter_names": ["default"] * 4}) is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_training_takes_it_and_learns_the_same(name, smoothing, tmp_path, monkeypatch):
    # Before it took the number of labels, transformers' smoother averaged each batch by itself, over the labels that are
    # predicted: there, one batch a step, and no label on a first token, which is not.
    by_itself = smoothing and "num_items_in_batch" not in inspect.signature(LabelSmoother.__call__).parameters
    batches = 1 if by_itself else 2

    def train(kind) -> list[torch.Tensor]:
        handle = lora(tiny.make(name), task_type=tiny.task_of(name), seed=3)
        rows = [{key: value[i] for key, value in batch_for(name).items()} for i in (0, 1, 3)] * 4
        for row in rows if by_itself else ():
            row["labels"][0] = -100
        arguments = tf.TrainingArguments(
            output_dir=tmp_path, max_steps=8 // batches, per_device_train_batch_size=2, gradient_accumulation_steps=batches,
            report_to=[],
            label_smoothing_factor=smoothing, learning_rate=1e-2, save_strategy="no", use_cpu=True, seed=0, disable_tqdm=True,
        )  # fmt: skip
        kind(model=handle, args=arguments, train_dataset=rows).train()
        return [p.detach().clone() for p in handle.adapters.parameters()]

    calls = []
    fused = HeadLoss.__call__
    monkeypatch.setattr(HeadLoss, "__call__", lambda self, *rest, **more: calls.append(1) or fused(self, *rest, **more))
    for dropout in ("dropout", "dropout_rate"):
        monkeypatch.setattr(tf.T5Config, dropout, 0.0, raising=False)
    found = train(Trainer)
    assert len(calls) == 8
    if name == "t5":  # drops out, and draws in another order
        return
    for mine, theirs in zip(found, train(tf.Trainer)):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
