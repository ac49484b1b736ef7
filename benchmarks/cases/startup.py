"""How long does startup take? Import, attach 1,000 adapters to one base, load one adapter from a folder, switch."""

from __future__ import annotations

import importlib
import tempfile
import time
from typing import Any

PAGE = "benchmarks/startup.md"
ADAPTERS = 1000
LIMIT = 240.0  # seconds; a side that has not attached all of them by then goes on with those it has
STAGES = {
    "import": "importing the library, with torch and transformers already imported",
    "attach": f"attaching {ADAPTERS:,} LoRA adapters (r=8, queries and values of 12 layers)",
    "load": "loading one more adapter from a folder",
    "switch": "switching from one adapter to another",
}
VARIANTS = {"Tunesmith": {"library": "tunesmith"}, "peft": {"library": "peft"}}


def run(library: str) -> dict[str, Any]:
    import torch
    import transformers as tf

    tf.LlamaForCausalLM  # noqa: B018  (lazily imported; not part of the measured import)
    started = time.perf_counter()
    module: Any = importlib.import_module(library)
    module.get_peft_model, module.LoraConfig  # noqa: B018
    seconds = {"import": time.perf_counter() - started}

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "vocab_size": 256}
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**shape))
    config = {"task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj", "v_proj"]}
    with tempfile.TemporaryDirectory() as folder:
        handle = module.get_peft_model(base, module.LoraConfig(**config))
        handle.save_pretrained(folder)
        started, attached = time.perf_counter(), 1
        while attached < ADAPTERS and time.perf_counter() - started < LIMIT:
            handle.add_adapter(f"adapter_{attached}", module.LoraConfig(**config))
            attached += 1
        seconds["attach"] = time.perf_counter() - started
        started = time.perf_counter()
        handle.load_adapter(folder, "loaded")
        seconds["load"] = time.perf_counter() - started
    started = time.perf_counter()
    handle.set_adapter("adapter_7")
    seconds["switch"] = time.perf_counter() - started
    return {**seconds, "attached": attached}


def report(records: list[dict[str, Any]]) -> str:
    by_name = {record["variant"]: record for record in records}
    lines = [
        "# How long does startup take?",
        "",
        "| stage | Tunesmith | peft | speedup |",
        "|---|---:|---:|---:|",
    ]
    own, peer = by_name.get("Tunesmith", {}), by_name.get("peft", {})
    for stage, what in STAGES.items():
        if stage in own and stage in peer:
            cells = f"{1000 * own[stage]:,.1f} ms | {1000 * peer[stage]:,.1f} ms | {peer[stage] / own[stage]:,.0f}x"
            lines.append(f"| {what} | {cells} |")
    if own and peer and "error" not in own and "error" not in peer:
        totals = [sum(record[stage] for stage in STAGES) for record in (own, peer)]
        lines.append(f"| total | {totals[0]:.2f} s | {totals[1]:.2f} s | {totals[1] / totals[0]:,.0f}x |")
        if peer["attached"] < ADAPTERS:
            count = f"{peer['attached']:,}"
            lines += ["", f"peft was stopped after {LIMIT:.0f} s, with {count} adapters attached; its figures are for those."]
        lines += ["", f"Peak memory: {own['peak_mb']:,.0f} MB; peft, {peer['peak_mb']:,.0f} MB."]
    return "\n".join(lines)
