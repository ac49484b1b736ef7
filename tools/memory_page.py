"""Write docs/benchmarks/memory.md: the memory that fine-tuning Llama-2 takes in each size, as `tunesmith plan` predicts it.

python tools/memory_page.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import transformers
from benchmarks.cases import qlora

from tunesmith.jobs.settings import Settings
from tunesmith.jobs.sizing import plan_training

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "memory.md"
BASES = ("Llama-2-7B", "Llama-2-13B")
STORED: dict[str, dict[str, Any]] = {
    "LoRA, 16 bits": {},
    "INT8": {"load_in_8bit": True},
    "NF4": {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
    "NF4, double quantisation": {"load_in_4bit": True},
}
# The job of examples/03_qlora_python_coder.py at full size; 512 tokens a step
JOB: dict[str, Any] = {
    "method": "lora", "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "dtype": "bfloat16", "max_length": 512,
    "per_device_train_batch_size": 1, "optim": "paged_adamw_32bit", "held_out": 0.0,
}  # fmt: skip


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


def page() -> str:
    lines = [
        "# How much memory does QLoRA take?",
        "",
        "Predicted peak of the whole process in GB, for the QLoRA example (LoRA with r=64 on q and v, dropout 0.1, 32-bit",
        "AdamW, one row of 512 tokens per step) on a CPU in bfloat16. The predictions are those of `tunesmith plan`, which",
        "simulates the steps on meta tensors: tensors with shapes but no data.",
        "",
        "| base | stored as | base alone | without gradient checkpointing | with gradient checkpointing |",
        "|---|---|---:|---:|---:|",
    ]
    for base in BASES:
        for stored, settings in STORED.items():
            plans = [
                plan_training(Settings(base=base, gradient_checkpointing=checkpointing, **JOB, **settings), device="cpu")
                for checkpointing in (False, True)
            ]
            sizes = [plans[0].base, *(plan.peak for plan in plans)]
            lines.append(f"| {base} | {stored} | {' | '.join(f'{size / 1e9:.2f}' for size in sizes)} |")
    return "\n".join([*lines, *against_a_run()]) + "\n"


def against_a_run() -> list[str]:
    """The same prediction beside what benchmarks/cases/qlora.py measured, if its records are available."""
    records = ROOT / "benchmarks" / "results" / "qlora.jsonl"
    if not records.is_file():
        return []
    measured = {record["variant"]: record for record in map(json.loads, records.read_text().splitlines())}
    lines = ["", "Compared with a measured run, with TinyLlama's shape in NF4 with double quantisation ([more](qlora.md)):", ""]
    lines += ["| | predicted | measured |", "|---|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaConfig(**qlora.SHAPE).save_pretrained(folder)
        for name, checkpointing in (("with gradient checkpointing", True), ("without", False)):
            settings = Settings(base=folder, gradient_checkpointing=checkpointing, load_in_4bit=True, **JOB)
            run = measured["train: Tunesmith" if checkpointing else "train: Tunesmith, no checkpointing"]
            lines.append(
                f"| {name} | {plan_training(settings, device='cpu').peak / 1e9:.2f} | {run['peak_mb'] * 2**20 / 1e9:.2f} |"
            )
    return lines


if __name__ == "__main__":
    main()
