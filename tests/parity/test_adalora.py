"""AdaLoRA's schedule: the same ranks as the reference's, in every training loop, without a call in it."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import output, quiet, read_by_peft, tensors, written_by_peft

SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 12, "deltaT": 2, "lora_alpha": 8}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    made = [tiny.inputs_for("llama", seed=seed) for seed in range(count)]
    return [{**inputs, "labels": inputs["input_ids"]} for inputs in made]


def ours(**options) -> ts.PeftModel:
    torch.manual_seed(0)
    config = ts.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **{**SCHEDULE, **options})
    return ts.get_peft_model(tiny.make("llama"), config).train()


def pair(tmp_path, **options) -> tuple[ts.PeftModel, peft.PeftModel]:
    """Both libraries' models, training, with the same values."""
    handle = ours(**options)
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **{**SCHEDULE, **options})
    with quiet():
        theirs = peft.get_peft_model(tiny.make("llama"), config)
    values = {name.replace("_adapter.", ""): value for name, value in handle.tree("default").state_dict().items()}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name.removeprefix("base_model.model.").removesuffix(".default")])
    return handle, theirs.train()


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)


def triplets(handle: ts.PeftModel) -> dict[str, torch.Tensor]:
    named = handle.tree("default").state_dict()
    return {name.replace("_adapter.", ""): value for name, value in named.items()}


def check_equal(handle: ts.PeftModel, theirs: peft.PeftModel) -> None:
    mine = triplets(handle)
    named = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == {name.removesuffix(".default") for name in named}
    for name, parameter in named.items():
        torch.testing.assert_close(mine[name.removesuffix(".default")], parameter.detach(), atol=1e-5, rtol=1e-5)
        if ".lora_E" in name:
            assert torch.equal(mine[name.removesuffix(".default")] == 0, parameter == 0)


def check_same_pattern(handle: ts.PeftModel, theirs: peft.PeftModel) -> None:
    """To be asked in the end: the reference has a pattern before, and files with it lack triplets that act at the time."""
    pattern = {key.removesuffix(".default"): kept for key, kept in theirs.peft_config["default"].rank_pattern.items()}
    assert handle.peft_config["default"].rank_pattern == pattern


def kept(handle: ts.PeftModel) -> int:
    return sum(int((value != 0).sum()) for name, value in triplets(handle).items() if name.endswith("lora_E"))


@pytest.mark.parametrize("first_step", [0, 1])
@pytest.mark.parametrize(
    "options", [{}, {"tinit": 0, "tfinal": 1, "deltaT": 1}, {"deltaT": 3, "beta1": 0.5, "beta2": 0.95}], ids=str
)
def test_every_step_equals_the_references(options, first_step, tmp_path):
    """Scripts call `update_and_allocate` themselves, from 0 or 1; the steps that the hook counts are not counted twice."""
    handle, theirs = pair(tmp_path, **options)
    steppers = [optimiser(model) for model in (handle, theirs)]
    for step, batch in enumerate(batches(14), start=first_step):
        losses = []
        for model, stepper in zip((handle, theirs), steppers):
            losses.append(model(**batch).loss)
            losses[-1].backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
            stepper.step()
        handle.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
        check_equal(handle, theirs)
        for stepper in steppers:
            stepper.zero_grad()
    check_same_pattern(handle, theirs)
    assert kept(handle) == 2 * 3 * 2  # target_r for each of three modules in two layers


@pytest.mark.parametrize("to_none", [True, False])
def test_plain_loop_without_a_call_equals_the_reference_with_calls(to_none, tmp_path):
    handle, theirs = pair(tmp_path)
    steppers = [optimiser(model) for model in (handle, theirs)]
    for step, batch in enumerate(batches(13), start=1):
        for model, stepper in zip((handle, theirs), steppers):
            stepper.zero_grad(set_to_none=to_none)
            model(**batch).loss.backward()
            stepper.step()
        theirs.base_model.update_and_allocate(step)
        check_equal(handle, theirs)
    assert kept(handle) == 12


def test_a_call_before_the_optimiser_steps_counts_once(tmp_path):
    handle, theirs = pair(tmp_path)
    steppers = [optimiser(model) for model in (handle, theirs)]
    for step, batch in enumerate(batches(12)):
        for model, stepper in zip((handle, theirs), steppers):
            model(**batch).loss.backward()
            (handle if model is handle else theirs.base_model).update_and_allocate(step)
            stepper.step()
            stepper.zero_grad()
        check_equal(handle, theirs)


def test_files_after_allocation_go_both_ways(tmp_path):
    handle, theirs = pair(tmp_path)
    steppers = [optimiser(model) for model in (handle, theirs)]
    for step, batch in enumerate(batches(12), start=1):
        for model, stepper in zip((handle, theirs), steppers):
            stepper.zero_grad()
            model(**batch).loss.backward()
            stepper.step()
        theirs.base_model.update_and_allocate(step)
    handle.eval()
    theirs.eval()
    handle.save_pretrained(tmp_path / "ours")
    written_by_peft(theirs, tmp_path / "theirs")
    mine, reference = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert {k: (t.shape, t.dtype) for k, t in mine.items()} == {k: (t.shape, t.dtype) for k, t in reference.items()}
    assert sum(len(tensor) for name, tensor in mine.items() if name.endswith("lora_E")) == 12
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]

    inputs = tiny.inputs_for("llama")
    with quiet():
        read = read_by_peft(tiny.make("llama"), tmp_path / "ours")
    torch.testing.assert_close(output(handle, inputs), output(read, inputs), atol=1e-5, rtol=0)
    for who in ("ours", "theirs"):
        again = ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / who).eval()
        torch.testing.assert_close(output(again, inputs), output(handle, inputs), atol=1e-5, rtol=0)
        again.save_pretrained(tmp_path / f"{who} again")
        first, second = tensors(tmp_path / who), tensors(tmp_path / f"{who} again")
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(output(again, inputs), output(again.bare_base, inputs))


def test_read_adapter_trains_on_with_the_ranks_it_has(tmp_path):
    handle = ours()
    train(handle, 12)
    handle.save_pretrained(tmp_path)
    again = ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path, is_trainable=True).train()
    pattern = copy.deepcopy(again.peft_config["default"].rank_pattern)
    before = {name: value.clone() for name, value in triplets(again).items()}
    train(again, 12)
    assert kept(again) == 12 and again.peft_config["default"].rank_pattern == pattern
    assert any(not torch.equal(before[name], value) for name, value in triplets(again).items())


def test_file_of_an_unfinished_schedule_holds_every_triplet(tmp_path):
    """Triplets that are switched off at the time may come back, so none is left out and the file computes the same."""
    handle, inputs = ours(), tiny.inputs_for("llama")
    train(handle, 7)
    handle.eval().save_pretrained(tmp_path)
    assert sum(len(tensor) for name, tensor in tensors(tmp_path).items() if name.endswith("lora_E")) == 4 * 3 * 2
    again = ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path).eval()
    assert torch.equal(output(again, inputs), output(handle, inputs))


def train(handle: nn.Module, steps: int, stepper: torch.optim.Optimizer | None = None) -> None:
    stepper = stepper or optimiser(handle)
    for batch in batches(steps):
        handle(**batch).loss.backward()
        stepper.step()
        stepper.zero_grad()


def test_accumulated_gradients_count_as_one_step():
    handle = ours()
    stepper = optimiser(handle)
    for index, batch in enumerate(batches(24)):
        (handle(**batch).loss / 2).backward()
        if index % 2:
            stepper.step()
            stepper.zero_grad()
        if index == 7:  # four steps: the ranks are not final yet
            assert kept(handle) > 12
    assert kept(handle) == 12


def test_an_optimiser_of_other_parameters_counts_nothing():
    handle, other = ours(), nn.Parameter(torch.ones(2))
    stepper = torch.optim.SGD([other], lr=0.1)
    for _ in range(20):
        other.grad = torch.ones(2)
        stepper.step()
    assert handle.peft_config["default"].rank_pattern is None
    train(handle, 12)
    assert kept(handle) == 12


@pytest.mark.parametrize("again", [copy.deepcopy, lambda handle: pickle.loads(pickle.dumps(handle))], ids=["copied", "pickled"])
def test_schedule_goes_on_in_a_copy(again):
    handle = ours()
    train(handle, 4)
    copied = again(handle)
    train(copied, 8)
    assert kept(copied) == 12 < kept(handle)
    train(handle, 8)
    assert kept(handle) == 12


@pytest.mark.parametrize("trainer", [transformers.Trainer, ts.Trainer], ids=["transformers", "tunesmith"])
def test_trainers_run_the_schedule(trainer, tmp_path):
    handle = ours()
    rows = [{name: value[0] for name, value in batch.items()} for batch in batches(24)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=1, gradient_accumulation_steps=2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer(model=handle, args=arguments, train_dataset=rows).train()
    assert kept(handle) == 12


def test_penalty_is_part_of_the_loss_in_training_only():
    """The reference adds it in evaluation, too, where it makes losses incomparable with other methods'."""
    weighted, plain = ours(orth_reg_weight=0.5), ours(orth_reg_weight=0.0)
    batch = batches(1)[0]
    factors = [value if name.endswith("lora_A") else value.T for name, value in triplets(plain).items() if "lora_E" not in name]
    distances = [(factor @ factor.T - torch.eye(len(factor))).norm() for factor in factors]
    expected = 0.5 * sum(distances) / len(distances)
    torch.testing.assert_close(weighted(**batch).loss - plain(**batch).loss, expected, atol=1e-5, rtol=0)
    as_tuple = weighted(**batch, return_dict=False)[0] - plain(**batch, return_dict=False)[0]
    torch.testing.assert_close(as_tuple, expected, atol=1e-5, rtol=0)
    with weighted.disable_adapter(), plain.disable_adapter():
        assert torch.equal(weighted(**batch).loss, plain(**batch).loss)
    weighted.eval(), plain.eval()
    assert torch.equal(weighted(**batch).loss, plain(**batch).loss)


def test_call_for_a_method_without_a_schedule_is_refused():
    handle = ts.get_peft_model(tiny.make("llama"), ts.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ts.UsageError, match="no active adapter has a budget"):
        handle.update_and_allocate(1)
