"""Does each method learn? Every method trains sprout on the same rows; perplexity on rows it has not seen."""

from __future__ import annotations

import io
import math
import tempfile
import time
from pathlib import Path
from typing import Any

PAGE = "benchmarks/learning.md"
MARGIN = 0.04  # a method must lower the held-out loss (nats per token) by at least this fraction
EPOCHS = 4
DATA = Path(__file__).parents[3] / "shared" / "data" / "prompts.csv"  # real rows; without them, the demo's

VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora"},
    "LoRA, all-linear": {"method": "lora", "options": {"target_modules": "all-linear"}},
    "rsLoRA": {"method": "lora", "options": {"use_rslora": True, "lora_alpha": 6}},
    "DoRA": {"method": "lora", "options": {"use_dora": True}},
    "LoRA from PiSSA": {"method": "lora", "learning_rate": 1e-3, "options": {"init_lora_weights": "pissa"}},
    "LoRA from OLoRA": {"method": "lora", "learning_rate": 1e-3, "options": {"init_lora_weights": "olora"}},
    "AdaLoRA": {"method": "adalora", "options": {"tinit": 10, "tfinal": 20, "deltaT": 5}},
    "VeRA": {"method": "vera"},
    "LoHa": {"method": "loha"},
    "LoKr": {"method": "lokr"},
    "OFT": {"method": "oft"},
    "BOFT": {"method": "boft"},
    "HRA": {"method": "hra"},
    "IA3": {"method": "ia3"},
    "LN tuning": {"method": "ln-tuning"},
    "bottleneck, Houlsby": {"method": "bottleneck"},
    "bottleneck, Pfeiffer": {"method": "bottleneck", "options": {"style": "pfeiffer"}},
    "bottleneck, parallel": {"method": "bottleneck", "options": {"style": "parallel"}},
    "prompt tuning": {"method": "prompt-tuning"},
    "P-tuning, MLP": {"method": "p-tuning"},
    "P-tuning, LSTM": {"method": "p-tuning", "options": {"encoder_reparameterization_type": "LSTM"}},
    "prefix tuning": {"method": "prefix-tuning"},
    "prefix tuning, projected": {"method": "prefix-tuning", "learning_rate": 3e-3, "options": {"prefix_projection": True}},
    "LLaMA-Adapter": {"method": "adaption-prompt"},
    "trained rows of 256 tokens": {"method": "trainable-tokens", "options": {"token_indices": list(range(260, 516))}},
}

LABELS = {  # as the page prints them; records keep the keys of VARIANTS
    "LoRA from PiSSA": "LoRA, PiSSA initialisation",
    "LoRA from OLoRA": "LoRA, OLoRA initialisation",
    "prefix tuning, projected": "prefix tuning with projection",
    "trained rows of 256 tokens": "trainable tokens, 256 rows",
}


def run(method: str, learning_rate: float | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
    from rich.console import Console

    from tunesmith.assets import FOLDER
    from tunesmith.auto import load_base, load_tokenizer
    from tunesmith.data.files import read_texts
    from tunesmith.jobs import job, quiet
    from tunesmith.jobs.progress import JobConsole

    quiet.hush()
    texts = read_texts(DATA if DATA.is_file() else FOLDER / "demo" / "prompts.csv", "prompt")
    base, tokenizer = load_base("sprout").float().eval(), load_tokenizer("sprout")
    settings = job.Settings(method, num_train_epochs=EPOCHS, learning_rate=learning_rate, options=options or {}, held_out=0.15)
    started = time.monotonic()
    result = job.train(base, tokenizer, texts, settings, JobConsole(method, Console(file=io.StringIO())))
    with tempfile.TemporaryDirectory() as folder:
        size = job.save(result, tokenizer, Path(folder))
    assert result.held_out_before is not None and result.held_out_after is not None
    return {
        "config": type(result.handle.active_peft_config).__name__,
        "learning_rate": settings.rate,
        "trained": result.handle.get_nb_trainable_parameters()[0],
        "bytes": size,
        "seconds": result.seconds,
        "all_seconds": time.monotonic() - started,
        "before": result.held_out_before,
        "after": result.held_out_after,
        "rows": len(texts),
        "held_out_rows": len(result.held_out),
        "data": "prompts.csv (real prompts)" if DATA.is_file() else "the demo's prompts",
    }


def learned(record: dict[str, Any]) -> bool:
    return bool(record["after"] <= (1 - MARGIN) * record["before"])


def report(records: list[dict[str, Any]]) -> str:
    done = [record for record in records if "error" not in record]
    first = done[0]
    lines = [
        "# Does every method learn?",
        "",
        f"Each method trains *sprout* (8 M parameters, fp32) for {EPOCHS} epochs on "
        f"{first['rows'] - first['held_out_rows']} rows of {first['data']}; perplexity is measured on {first['held_out_rows']} "
        f"held-out rows and is {math.exp(first['before']):.1f} without an adapter. A method passes if its held-out loss falls "
        f"by at least {MARGIN:.0%}. Settings are the defaults; methods are not compared at their best.",
        "",
        "| method | trained parameters | file | training | peak memory | learning rate | held-out perplexity | loss falls by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        name = LABELS.get(r["variant"], r["variant"])
        if "error" in r:
            lines.append(f"| {name} | failed: {r['error'][0]} | | | | | | |")
            continue
        fall = f"{1 - r['after'] / r['before']:.1%}" + ("" if learned(r) else " **(does not pass)**")
        cells = (name, f"{r['trained']:,}", f"{r['bytes'] / 1024:.1f} KB", f"{r['seconds']:.0f} s")
        cells += (f"{r['peak_mb']:.0f} MB", f"{r['learning_rate']:g}", f"{math.exp(r['after']):.1f}", fall)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
