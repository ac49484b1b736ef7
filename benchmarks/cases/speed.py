"""How fast does an adapter train? The same job on the same tokens with Tunesmith and with the peers.

Bases have the shapes of real models and random weights (no model can be downloaded here); rows are real texts. A variant
is `<job>: <side>`; the sides are ours, the reference library with transformers' Trainer as its readers run it (fp32),
and the same at its best (bf16).
"""

from __future__ import annotations

import csv
import importlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

PAGE = "benchmarks/speed.md"
DATA = Path(__file__).parents[3] / "shared" / "data"
STEPS = 4  # the first one is not counted

SIDES = ("ours", "peft, default", "peft, bf16")
MAX_LENGTH = 256
QWEN = {
    "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
BLOOM = {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}
MT5 = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 250112, "dropout_rate": 0.0}
JOBS: dict[str, dict[str, Any]] = {
    "S0: prompt tuning, 4 tokens, bloomz-560m": {
        "config": "BloomConfig", "shape": BLOOM, "method": "prompt", "tokens": 4, "batch": 8, "rows": 50, "data": "texts",
    },
    "LoRA r=16 all-linear, Qwen2.5-0.5B": {
        "config": "Qwen2Config", "shape": QWEN, "method": "lora", "r": 16, "target_modules": "all-linear", "batch": 4,
        "rows": 50, "data": "pairs",
    },
    "prompt tuning, 200 tokens, Qwen2.5-0.5B": {
        "config": "Qwen2Config", "shape": QWEN, "method": "prompt", "tokens": 200, "batch": 4, "rows": 50, "data": "texts",
    },
    "LoRA r=8, mT5-small": {
        "config": "MT5Config", "shape": MT5, "method": "lora", "r": 8, "batch": 8, "rows": 50, "data": "pairs", "seq2seq": True,
    },
}  # fmt: skip
VARIANTS = {f"{job}: {side}": {"job": job, "side": side} for job in JOBS for side in SIDES}


def run(job: str, side: str) -> dict[str, Any]:
    import torch
    import transformers as tf

    spec = JOBS[job]
    library: Any = importlib.import_module("tunesmith" if side == "ours" else "peft")
    trainer_class: Any = library.Trainer if side == "ours" else tf.Trainer
    config = getattr(tf, spec["config"])(**spec["shape"])
    torch.manual_seed(0)
    base = tf.AutoModelForSeq2SeqLM if spec.get("seq2seq") else tf.AutoModelForCausalLM
    model = base.from_config(config, dtype=torch.float32 if side == "peft, default" else torch.bfloat16)
    rows, collator, clock = _rows(spec, config.vocab_size), Collator(), _clock()
    torch.manual_seed(0)
    handle = library.get_peft_model(model, _peft_config(library, spec))
    with tempfile.TemporaryDirectory() as folder:
        arguments = tf.TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=spec["batch"], learning_rate=1e-3, seed=0,
            report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, bf16=side == "peft, bf16",
        )  # fmt: skip
        trainer_class(model=handle, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[clock]).train()
    return {
        "tokens_per_second": sum(collator.tokens[1:STEPS]) / sum(clock.seconds[1:STEPS]),
        "step_seconds": statistics.median(clock.seconds[1:STEPS]),
        "first_loss": clock.losses[0],
        "final_loss": clock.losses[-1],
    }


def _peft_config(library: Any, spec: dict[str, Any]) -> Any:
    if spec["method"] == "prompt":
        return library.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=spec["tokens"])
    task = "SEQ_2_SEQ_LM" if spec.get("seq2seq") else "CAUSAL_LM"
    return library.LoraConfig(task_type=task, r=spec["r"], lora_alpha=32, target_modules=spec.get("target_modules"))


def _rows(spec: dict[str, Any], words: int) -> list[dict[str, list[int]]]:
    """Real texts, split by sprout's tokenizer and spread over the vocabulary, so that lengths are real."""
    from tunesmith import load_tokenizer
    from tunesmith.assets import FOLDER

    tokenizer = load_tokenizer("sprout")

    def ids(text: str) -> list[int]:
        return [(id * 37 + 5) % words for id in tokenizer(text)["input_ids"]][:MAX_LENGTH]

    pairs = [(row["instruction"] + row["input"], row["output"]) for row in _read("alpaca_en_demo.json", FOLDER)]
    if spec["data"] == "pairs":
        found = []
        for question, answer in pairs[: spec["rows"]]:
            first, second = ids(question), ids(answer)
            if spec.get("seq2seq"):
                found.append({"input_ids": first, "labels": second})
            else:
                found.append(
                    {"input_ids": (first + second)[:MAX_LENGTH], "labels": ([-100] * len(first) + second)[:MAX_LENGTH]}
                )
        return found
    texts = [row["prompt"] for row in _read("prompts.csv", FOLDER)]
    return [{"input_ids": ids(text), "labels": ids(text)} for text in texts[: spec["rows"]]]


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


class Collator:
    """Pads at the right, as the peers' collators do; notes how many real tokens each batch has."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        import torch

        length, labels = max(len(r["input_ids"]) for r in rows), max(len(r["labels"]) for r in rows)
        separate = any(len(r["labels"]) != len(r["input_ids"]) for r in rows)
        self.tokens.append(sum(len(r["input_ids"]) + separate * len(r["labels"]) for r in rows))
        return {
            "input_ids": torch.tensor([r["input_ids"] + [0] * (length - len(r["input_ids"])) for r in rows]),
            "attention_mask": torch.tensor([[1] * len(r["input_ids"]) + [0] * (length - len(r["input_ids"])) for r in rows]),
            "labels": torch.tensor([r["labels"] + [-100] * (labels - len(r["labels"])) for r in rows]),
        }


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Clock()


def report(records: list[dict[str, Any]]) -> str:
    lines = [
        "# How fast does an adapter train?",
        "",
        f"Real tokens per second (padding is not counted) over steps 2 to {STEPS} of the same job on the same rows; peak",
        "memory of the process. Bases have the named models' shapes and random weights.",
        "",
        "| job | side | real tokens/s | of ours | peak memory | of ours | last loss |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    by_name = {record["variant"]: record for record in records}
    for job in JOBS:
        mine = by_name.get(f"{job}: ours")
        for side in SIDES:
            r = by_name.get(f"{job}: {side}")
            if r is None or mine is None:
                continue
            if "error" in r or "error" in mine:
                lines.append(f"| {job} | {side} | failed: {r.get('error', ['ours failed'])[0]} | | | | |")
                continue
            speed, memory = r["tokens_per_second"], r["peak_mb"]
            lines.append(
                f"| {job} | {side} | {speed:.0f} | {speed / mine['tokens_per_second']:.2f} | {memory:,.0f} MB "
                f"| {memory / mine['peak_mb']:.2f} | {r['final_loss']:.3f} |"
            )
    return "\n".join(lines)
