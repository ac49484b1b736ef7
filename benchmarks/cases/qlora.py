"""QLoRA: LoRA on a 4-bit base, as in examples/03_qlora_python_coder.py. Memory and time of training, time of generation.

The base has TinyLlama's shape (1.1 billion parameters) and random weights. Its 4-bit checkpoint is made once, by
`tunesmith quantize`, below the system's folder for temporary files.
"""

from __future__ import annotations

import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAGE = "benchmarks/qlora.md"
SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
LENGTH, STEPS = 512, 5
PROMPT, NEW_TOKENS = 64, 48
LORA = {"task_type": "CAUSAL_LM", "r": 64, "lora_alpha": 16, "lora_dropout": 0.1}
SIDES: dict[str, dict[str, Any]] = {
    "peft": {"library": "peft"},
    "peft, at its best": {"library": "peft", "widen": False, "checkpointing": False},
    "Tunesmith": {"library": "tunesmith", "widen": False},
    "Tunesmith, no checkpointing": {"library": "tunesmith", "widen": False, "checkpointing": False},
}
WHAT = {
    "peft": "`prepare_model_for_kbit_training` (unquantised weights in fp32, gradient checkpointing)",
    "peft, at its best": "nothing cast to fp32, no gradient checkpointing",
    "Tunesmith": "nothing cast to fp32, gradient checkpointing, `tunesmith.Trainer`",
    "Tunesmith, no checkpointing": "the same without gradient checkpointing",
}
VARIANTS = {
    **{f"train: {side}": {"job": "train", **options} for side, options in SIDES.items()},
    "generate: peft": {"job": "generate", "library": "peft"},
    "generate: Tunesmith": {"job": "generate", "library": "tunesmith"},
}


def run(job: str, library: str, **options: Any) -> dict[str, Any]:
    import torch

    os.environ["BITSANDBYTES_NOWELCOME"] = "1"
    folder = checkpoint()
    torch.manual_seed(0)
    return train(folder, library, **options) if job == "train" else generate(folder, library)


def train(folder: Path, library: str, widen: bool = True, checkpointing: bool = True) -> dict[str, Any]:
    """Seconds of a step, the most memory while training, and the losses of all steps."""
    import torch
    import transformers as tf

    own = importlib.import_module(library)
    base = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_cache=False)
    if widen:
        own.prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
    model = own.get_peft_model(base, own.LoraConfig(**LORA))
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 32000, (STEPS, LENGTH), generator=generator)]
    clock = _clock()
    held = memory_mb("VmRSS")
    _forget_peak()
    with tempfile.TemporaryDirectory() as out:
        arguments = tf.TrainingArguments(
            out, max_steps=STEPS, per_device_train_batch_size=1, learning_rate=2e-4, weight_decay=0.001, max_grad_norm=0.3,
            warmup_steps=0.03, lr_scheduler_type="cosine", optim="adamw_torch", gradient_checkpointing=checkpointing,
            report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        trainer = (own if library == "tunesmith" else tf).Trainer(model, arguments, train_dataset=rows, callbacks=[clock])
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = memory_mb("VmHWM")
    return {
        "seconds": statistics.median(clock.seconds[1:]), "training_peak_mb": peak, "loaded_mb": held, "loss": losses[-1],
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }  # fmt: skip


def generate(folder: Path, library: str) -> dict[str, Any]:
    """Milliseconds of a new token at batch 1, base and adapter loaded as for inference."""
    import torch
    import transformers as tf

    own = importlib.import_module(library)
    base = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = own.get_peft_model(base, own.LoraConfig(**LORA)).eval()
    ids = torch.randint(3, 32000, (1, PROMPT), generator=torch.Generator().manual_seed(1))

    def seconds(count: int) -> float:
        started = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                       do_sample=False)  # fmt: skip
        return time.perf_counter() - started

    with torch.inference_mode():
        seconds(2)
        prompt = statistics.median(seconds(1) for _ in range(3))
        whole = statistics.median(seconds(NEW_TOKENS + 1) for _ in range(3))
    return {"token_ms": 1e3 * (whole - prompt) / NEW_TOKENS, "prompt_seconds": prompt, "whole_seconds": whole}


def checkpoint() -> Path:
    """The folder of the 4-bit checkpoint; a process of its own makes it, so that its memory is not counted."""
    folder = Path(tempfile.gettempdir()) / "tunesmith-benchmarks" / "llama-1.1b-nf4"
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, "-c", f"from {__name__} import make; make({str(folder)!r})"], check=True)
    return folder


def make(folder: str) -> None:
    import torch
    import transformers as tf

    from tunesmith.bases.quantise import quantise_folder

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as dense:
        model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SHAPE), dtype=torch.bfloat16)
        model.save_pretrained(dense)
        del model
        quantise_folder(Path(dense), Path(folder))


def memory_mb(name: str) -> float:
    """Of this process: "VmRSS" is what it holds, "VmHWM" the most that it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def _forget_peak() -> None:
    """Linux counts the most memory from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    return Clock()


def report(records: list[dict[str, Any]]) -> str:
    by_name = {record["variant"]: record for record in records if "error" not in record}
    lines = [
        "# QLoRA: memory and time",
        "",
        "LoRA with r=64 on q and v, dropout 0.1, on a base of TinyLlama's shape (1.1 billion parameters, random weights) in",
        f"NF4 with double quantisation. Each step has {LENGTH} tokens; peak memory is that of the whole process. The setups:",
        "",
        *(f"- **{side}**: {what}." for side, what in WHAT.items()),
        "",
        "## Training",
        "",
        "| setup | seconds per step | speedup vs. peft | vs. its best | peak memory | memory vs. peft | vs. its best |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    peers = [by_name.get(f"train: {side}") for side in ("peft", "peft, at its best")]
    for side in SIDES:
        own = by_name.get(f"train: {side}")
        if own is None:
            continue
        faster = [f"{peer['seconds'] / own['seconds']:.2f}x" if peer else "" for peer in peers]
        share = [f"{own['peak_mb'] / peer['peak_mb']:.2f}x" if peer else "" for peer in peers]
        cells = [f"{own['seconds']:.2f}", *faster, f"{own['peak_mb']:,.0f} MB", *share]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Generation",
        "",
        f"A prompt of {PROMPT} tokens, then {NEW_TOKENS} more, batch size 1; base in bf16 and NF4, adapter not merged.",
        "",
        "| setup | ms per new token | seconds to first token | seconds in total |",
        "|---|---:|---:|---:|",
    ]
    for side in ("peft", "Tunesmith"):
        own = by_name.get(f"generate: {side}")
        if own is not None:
            numbers = f"{own['token_ms']:.0f} | {own['prompt_seconds']:.2f} | {own['whole_seconds']:.2f}"
            lines.append(f"| {side} | {numbers} |")
    return "\n".join(lines)
