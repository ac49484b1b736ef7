"""Plans against what is measured: of small runs in fresh processes, and of the benchmark's records."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from tests import tiny
from tunesmith import LoraConfig, get_peft_model, plan_training
from tunesmith.estimate import skeleton
from tunesmith.estimate.predict import Storage, predict
from tunesmith.jobs import sizing
from tunesmith.jobs.settings import Settings

ROOT = Path(__file__).parents[2]
LLAMA = {"vocab_size": 20_000, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}


def example(length: int = 64) -> dict[str, list[int]]:
    return {"input_ids": list(range(2, 2 + length)), "labels": list(range(2, 2 + length))}


def test_values_that_decide_are_real():
    """How many positions have a label is read from the batch, as in a real step."""
    few = {**example(60), "labels": [-100] * 50 + list(range(10))}
    config = tf.LlamaConfig(**{**LLAMA, "vocab_size": 500_000})
    lora = LoraConfig(task_type="CAUSAL_LM")
    whole, part = (predict(config, lora, [[row] * 4], Storage()) for row in (example(60), few))
    assert part.flops < 0.5 * whole.flops and part.activations == pytest.approx(whole.activations, rel=0.05)


@pytest.mark.parametrize("name", tiny.GENERATING)
def test_counts_are_those_of_the_real_model(name):
    model = tiny.make(name)
    config = LoraConfig(task_type=tiny.task_of(name), r=4)
    plan = predict(model.config, config, [[example(7)] * 2], Storage(torch.float32))
    handle = get_peft_model(model, config)
    assert (plan.trainable, plan.total) == handle.get_nb_trainable_parameters()
    assert plan.base == sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    assert plan.adapter == 4 * plan.trainable == plan.gradients == plan.moments / 2


@pytest.mark.parametrize("method", ["lora", "prompt-tuning", "p-tuning", "prefix-tuning", "ia3", "dora"])
def test_methods_are_planned_on_any_known_base(method):
    options = {"use_dora": True} if method == "dora" else {}
    settings = Settings("lora" if options else method, base="gpt2", max_length=64, options=options, held_out=0.0)
    assert plan_training(settings, sizing.Rows(3)).peak > 500e6


def test_checkpointing_quantising_and_smaller_batches_take_less():
    settings = Settings("lora", base="Qwen2.5-0.5B", max_length=128, held_out=0.0)
    rows = sizing.Rows(8)
    asked = plan_training(settings, rows)
    checkpointed = plan_training(dataclasses.replace(settings, gradient_checkpointing=True), rows)
    assert checkpointed.activations < 0.3 * asked.activations and checkpointed.flops > 1.2 * asked.flops
    halved = plan_training(dataclasses.replace(settings, per_device_train_batch_size=4), rows)
    assert halved.activations == pytest.approx(asked.activations / 2, rel=0.05)
    config, lora = skeleton.config_of("Qwen2.5-0.5B"), settings.peft_config("x")
    four = predict(config, lora, [rows.batch(1, 32)], Storage(bits=4))
    linear = 24 * (896 * 896 * 2 + 896 * 128 * 2 + 3 * 896 * 4864)
    assert four.base == pytest.approx(asked.base - 2 * linear + linear * (0.5 + 1 / 64 + 4 / 64 / 256), rel=1e-3)


STEPS = """
import json, sys, tempfile, torch, transformers as tf
from tunesmith import LoraConfig, PromptTuningConfig, get_peft_model
from tunesmith.train.batching import batching
from tunesmith.estimate.machine import peak_resident
shape, length, prompt = json.loads(sys.argv[1])
torch.manual_seed(0)
model = tf.LlamaForCausalLM._from_config(tf.LlamaConfig(**shape, use_cache=False), dtype=torch.bfloat16)
kind = PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM") if prompt else LoraConfig(task_type="CAUSAL_LM")
handle = get_peft_model(model, kind)
trainer, collator = batching(handle, None, 0)
rows = [{"input_ids": list(range(2, length + 2)), "labels": list(range(2, length + 2))}] * 24
with tempfile.TemporaryDirectory() as folder:
    options = dict(output_dir=folder, num_train_epochs=1, per_device_train_batch_size=8, report_to=[], save_strategy="no")
    trainer(handle, tf.TrainingArguments(**options, use_cpu=True, disable_tqdm=True), collator, rows).train()
print(peak_resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured as Linux counts")
@pytest.mark.parametrize("prompt", [False, True], ids=["lora", "prompt"])
def test_a_run_in_a_fresh_process_takes_what_was_planned(prompt):
    from tunesmith import PromptTuningConfig

    length = 160
    config = tf.LlamaConfig(**LLAMA, use_cache=False)
    kind = PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM") if prompt else LoraConfig(task_type="CAUSAL_LM")
    plan = predict(config, kind, [[example(length)] * 8], Storage())
    assert plan.activations + plan.working > 150e6, "else it is the program that is compared"
    command = [sys.executable, "-c", STEPS, json.dumps([LLAMA, length, prompt])]
    measured = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()[-1])
    assert plan.peak == pytest.approx(measured, rel=0.1)


def records() -> dict[str, float]:
    """Measured peaks of Tunesmith's runs in the speed benchmark, in bytes."""
    path = ROOT / "benchmarks" / "results" / "speed.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    found: dict[str, list[float]] = {}
    for line in lines:
        if line["variant"].endswith(": Tunesmith") and "peak_mb" in line:
            found.setdefault(line["variant"].removesuffix(": Tunesmith"), []).append(line["peak_mb"] * 2**20)
    return {name: sorted(peaks)[len(peaks) // 2] for name, peaks in found.items()}


@pytest.mark.skipif(not (ROOT.parent / "shared" / "data").is_dir(), reason="the records were made with other rows")
@pytest.mark.parametrize("job", records())
def test_plans_are_within_a_tenth_of_the_benchmarks_records(job):
    from benchmarks.cases import speed

    spec = speed.JOBS[job]
    config = getattr(tf, spec["config"])(**spec["shape"], use_cache=False)
    rows = speed._rows(spec, config.vocab_size)
    batches = largest_and_first(rows, spec["batch"], packed=config.model_type == "qwen2")
    plan = predict(config, speed._peft_config("tunesmith", spec), batches, Storage())
    assert plan.peak == pytest.approx(records()[job], rel=0.1), f"planned {plan.peak / 1e6:.0f}, {records()[job] / 1e6:.0f} MB"


def largest_and_first(rows, size: int, packed: bool) -> list[list[dict[str, list[int]]]]:
    """The two batches of the benchmark's epoch that decide, in the order in which its trainer takes them."""
    from accelerate.data_loader import SeedableRandomSampler

    from tunesmith.data.packing import LengthBuckets

    if packed:
        generator = torch.Generator()
        sampler = SeedableRandomSampler(rows, data_seed=0, generator=generator)
    else:
        sampler = LengthBuckets([len(row["input_ids"]) for row in rows], size, 0)
    order = [rows[index] for index in sampler]
    batches = [order[start : start + size] for start in range(0, len(order), size)]

    def weight(batch) -> int:
        lengths = [len(row["input_ids"]) for row in batch]
        return sum(lengths) if packed else max(lengths) * len(batch)

    assert math.isfinite(weight(batches[0]))
    return [batches[0], max(batches, key=weight)]
