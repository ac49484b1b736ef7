"""How fast does an adapter train? The same job on the same rows with Tunesmith and with other libraries.

Bases have the shapes of real models and random weights (no model can be downloaded here); rows are real texts. Each side
trains one epoch on the same rows in its own batches; anything it does before its first step counts too.
"""

from __future__ import annotations

import csv
import importlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

PAGE = "benchmarks/speed.md"
DATA = Path(__file__).parents[3] / "shared" / "data"
MAX_LENGTH = 256

SIDES = {
    "Tunesmith": "bf16, as in `tunesmith train`: packed rows or batches of similar length",
    "peft, default": "fp32, the stock transformers Trainer with its defaults",
    "peft, best": "bf16 weights, batches of similar length, no gradient checkpointing",
    "TRL, default": "SFTTrainer with its default settings (gradient checkpointing, fp32 weights)",
    "TRL, best": "SFTTrainer, bf16 weights, batches of similar length, no gradient checkpointing",
}
QWEN = {
    "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
BLOOM_560M = {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}
BLOOM_1B4_ZH = {"hidden_size": 2048, "n_layer": 8, "n_head": 16, "vocab_size": 46145}  # 24 layers, cut to 8
MT5 = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 250112, "dropout_rate": 0.0}
JOBS: dict[str, dict[str, Any]] = {
    "S0: prompt tuning, 4 tokens, bloomz-560m": {
        "label": "Two models on one base: prompt tuning, 4 tokens, bloomz-560m",
        "config": "BloomConfig", "shape": BLOOM_560M, "tokens": 4, "batch": 8, "rows": 50, "data": "prompts.csv",
    },
    "S2: prompt tuning, 16 tokens, bloom-1b4-zh cut to 8 layers": {
        "label": "Chinese prompt tuning: 16 tokens, bloom-1b4-zh cut to 8 layers",
        "config": "BloomConfig", "shape": BLOOM_1B4_ZH, "tokens": 16, "batch": 2, "accumulate": 8, "rows": 32,
        "data": "alpaca_zh_demo.json",
    },
    "LoRA r=16 all-linear, Qwen2.5-0.5B": {
        "config": "Qwen2Config", "shape": QWEN, "r": 16, "target_modules": "all-linear", "batch": 4, "rows": 16,
        "data": "alpaca_en_demo.json",
    },
    "LoRA r=8, mT5-small": {
        "config": "MT5Config", "shape": MT5, "r": 8, "batch": 8, "rows": 32, "data": "alpaca_en_demo.json", "seq2seq": True,
    },
    "prompt tuning, 200 tokens, Qwen2.5-0.5B": {
        "label": "Prompt tuning, 200 tokens, Qwen2.5-0.5B",
        "config": "Qwen2Config", "shape": QWEN, "tokens": 200, "batch": 4, "rows": 16, "data": "prompts.csv",
    },
}  # fmt: skip
LABELS = {job: spec.get("label", job) for job, spec in JOBS.items()}  # as pages print them; records keep the keys of JOBS
VARIANTS = {
    f"{job}: {side}": {"job": job, "side": side}
    for job, spec in JOBS.items()
    for side in SIDES
    if not side.startswith("TRL") or job.startswith("LoRA r=16")  # what SFTTrainer is mostly used for
}


def run(job: str, side: str) -> dict[str, Any]:
    import torch
    import transformers as tf

    spec = JOBS[job]
    config = getattr(tf, spec["config"])(**spec["shape"], use_cache=False)
    torch.manual_seed(0)
    base = tf.AutoModelForSeq2SeqLM if spec.get("seq2seq") else tf.AutoModelForCausalLM
    model = base.from_config(config, dtype=torch.bfloat16 if side == "Tunesmith" or side.endswith("best") else torch.float32)
    clock = _clock()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder, "num_train_epochs": 1, "per_device_train_batch_size": spec["batch"], "learning_rate": 1e-3,
            "gradient_accumulation_steps": spec.get("accumulate", 1), "seed": 0, "report_to": [], "save_strategy": "no",
            "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
        }  # fmt: skip
        if side.endswith("best"):
            options["train_sampling_strategy"] = "group_by_length"
        trainer, collator = _trainer(side, model, spec, _rows(spec, config.vocab_size), options)
        trainer.add_callback(clock)
        trainer.train()
    live = [sum(part) for part in _chunks(collator.live, spec.get("accumulate", 1))]
    return {
        "tokens_per_second": sum(collator.tokens) / clock.seconds,
        "seconds": clock.seconds,
        "tokens": sum(collator.tokens),
        "loss": sum(loss * count for loss, count in zip(clock.losses, live)) / sum(live),
    }


def _trainer(side: str, model: Any, spec: dict[str, Any], rows: list[dict[str, list[int]]], options: dict[str, Any]) -> Any:
    """`(trainer, its counting collator)`."""
    import transformers as tf

    collator = Counting(_padded)
    if side == "Tunesmith":
        from tunesmith import get_peft_model
        from tunesmith.data.packing import PackedCollator
        from tunesmith.train.batching import batching

        handle = get_peft_model(model, _peft_config("tunesmith", spec))
        kind, own = batching(handle, None, 0)
        if isinstance(own, PackedCollator):
            collator = Counting(own)
        return kind(handle, tf.TrainingArguments(**options), collator, rows), collator
    if side.startswith("peft"):
        import peft

        handle = peft.get_peft_model(model, _peft_config("peft", spec))
        return tf.Trainer(handle, tf.TrainingArguments(**options), collator, rows), collator
    import datasets
    import trl

    if side == "TRL, best":
        options |= {"gradient_checkpointing": False}
    arguments = trl.SFTConfig(**options, bf16=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    data, tokenizer = datasets.Dataset.from_list(rows), _tokenizer()
    config = _peft_config("peft", spec)
    return trl.SFTTrainer(
        model, arguments, data_collator=collator, train_dataset=data, processing_class=tokenizer, peft_config=config
    ), collator


def _peft_config(library: str, spec: dict[str, Any]) -> Any:
    configs = importlib.import_module(library)
    if "tokens" in spec:
        return configs.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=spec["tokens"])
    task = "SEQ_2_SEQ_LM" if spec.get("seq2seq") else "CAUSAL_LM"
    return configs.LoraConfig(task_type=task, r=spec["r"], lora_alpha=32, target_modules=spec.get("target_modules"))


def _tokenizer() -> Any:
    from tunesmith import load_tokenizer

    return load_tokenizer("sprout")


def _rows(spec: dict[str, Any], words: int) -> list[dict[str, list[int]]]:
    """Real texts, split by sprout's tokenizer and spread over the vocabulary, so that lengths are real."""
    from tunesmith.assets import FOLDER

    tokenizer = _tokenizer()

    def ids(text: str) -> list[int]:
        return [(id * 37 + 5) % words for id in tokenizer(text)["input_ids"]][:MAX_LENGTH]

    if spec["data"] == "prompts.csv":
        texts = [row["prompt"] for row in _read("prompts.csv", FOLDER)][: spec["rows"]]
        return [{"input_ids": ids(text), "labels": ids(text)} for text in texts]
    found = []
    for row in _read(spec["data"], FOLDER)[: spec["rows"]]:
        question, answer = ids(row["instruction"] + row["input"]), ids(row["output"])
        if spec.get("seq2seq"):
            found.append({"input_ids": question, "labels": answer})
        else:
            labels = [-100] * len(question) + answer
            found.append({"input_ids": (question + answer)[:MAX_LENGTH], "labels": labels[:MAX_LENGTH]})
    return found


def _read(name: str, demo: Path) -> list[dict[str, str]]:
    """Rows of the shared data; without it, the demo's texts in their place."""
    path = DATA / name
    if path.suffix == ".json" and path.is_file():
        return json.loads(path.read_text())
    with (path if path.is_file() else demo / "demo" / "prompts.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return (
        rows if name == "prompts.csv" else [{"instruction": r["prompt"][:60], "input": "", "output": r["prompt"]} for r in rows]
    )


class Counting:
    """A collator that notes how many real tokens, and how many with a label, each batch has."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.tokens: list[int] = []
        self.live: list[int] = []

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        separate = any(len(r["labels"]) != len(r["input_ids"]) for r in rows)
        self.tokens.append(sum(len(r["input_ids"]) + separate * len(r["labels"]) for r in rows))
        self.live.append(sum(label != -100 for r in rows for label in r["labels"]))
        return self.collate(rows)


def _padded(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """At the right, as the peers' collators pad."""
    import torch

    length, labels = max(len(r["input_ids"]) for r in rows), max(len(r["labels"]) for r in rows)
    return {
        "input_ids": torch.tensor([r["input_ids"] + [0] * (length - len(r["input_ids"])) for r in rows]),
        "attention_mask": torch.tensor([[1] * len(r["input_ids"]) + [0] * (length - len(r["input_ids"])) for r in rows]),
        "labels": torch.tensor([r["labels"] + [-100] * (labels - len(r["labels"])) for r in rows]),
    }


def _chunks(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds = 0.0
        losses: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Clock()


def report(records: list[dict[str, Any]]) -> str:
    lines = [
        "# How fast does an adapter train?",
        "",
        "Real tokens per second (padding excluded) over one epoch on the same rows, with the peak memory of the process and",
        "the epoch's mean loss. Each base has the shape of the named model and random weights. The setups:",
        "",
        *(f"- **{side}**: {what}." for side, what in SIDES.items()),
        "",
    ]
    by_name = {record["variant"]: record for record in records}
    for job in JOBS:
        own = by_name.get(f"{job}: Tunesmith")
        if own is None:
            continue
        lines += [
            f"## {LABELS[job]}",
            "",
            "| setup | real tokens/s | spread | runs | speedup of Tunesmith | peak memory | Tunesmith's memory | mean loss |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for side in SIDES:
            r = by_name.get(f"{job}: {side}")
            if r is None:
                continue
            if "error" in r or "error" in own:
                lines.append(f"| {side} | failed: {r.get('error', ['Tunesmith failed'])[0]} | | | | | | |")
                continue
            ratio, share = own["tokens_per_second"] / r["tokens_per_second"], own["peak_mb"] / r["peak_mb"]
            lines.append(
                f"| {side} | {r['tokens_per_second']:.0f} | {r['tokens_per_second_spread']:.0f} | {r['repeats']} "
                f"| {ratio:.2f}x | {r['peak_mb']:,.0f} MB | {share:.2f}x | {r['loss']:.3f} |"
            )
        lines.append("")
    return "\n".join(lines)
