"""What does padding cost? sprout with LoRA: rows padded in random order, padded in buckets of similar length, packed."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

PAGE = "benchmarks/packing.md"
EPOCHS = 2
BATCH = 8

SHARED = Path(__file__).parents[3] / "shared" / "data"

VARIANTS: dict[str, dict[str, Any]] = {
    f"{data}, {how}": {"data": data, "how": how}
    for data in ("prompts", "quotes", "instructions")
    for how in ("padded", "buckets", "packed")
}


def texts_of(data: str) -> list[str]:
    """The demo's rows, or the first 240 instructions with their answers (alpaca_en)."""
    from tunesmith.assets import FOLDER
    from tunesmith.data.files import read_texts

    if data == "instructions":
        rows = json.loads((SHARED / "alpaca_en_demo.json").read_text())[:240]
        return [f"{row['instruction']} {row['input']}\n{row['output']}" for row in rows]
    file, column = {"prompts": ("prompts.csv", "prompt"), "quotes": ("quotes.jsonl", "quote")}[data]
    return read_texts(FOLDER / "demo" / file, column)


def run(data: str, how: str) -> dict[str, Any]:
    from rich.console import Console

    from tunesmith.auto import load_base, load_tokenizer
    from tunesmith.data.encode import encode
    from tunesmith.data.packing import LengthBuckets
    from tunesmith.data.templates import Piece
    from tunesmith.data.text import PadRight
    from tunesmith.jobs import job, quiet
    from tunesmith.jobs.progress import JobConsole
    from tunesmith.train.batching import BucketTrainer

    quiet.hush()
    texts = texts_of(data)
    base, tokenizer = load_base("sprout").float().eval(), load_tokenizer("sprout")
    settings = job.Settings(
        "lora",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        held_out=0.15,
        options={"target_modules": "all-linear"},
        packing=how == "packed",
    )
    if how == "buckets":  # what a job does by itself only where it cannot pack
        job.batching = lambda handle, packing, pad_id: (BucketTrainer, PadRight(pad_id))
    result = job.train(base, tokenizer, texts, settings, JobConsole(how, Console(file=io.StringIO())))
    assert result.held_out_before is not None and result.held_out_after is not None

    encoded = encode([[Piece(text, True)] for text in texts], tokenizer, settings.max_length)
    lengths = [len(row["input_ids"]) for row in encoded.examples]
    orders = {
        "padded": random.Random(0).sample(range(len(lengths)), len(lengths)),
        "buckets": list(LengthBuckets(lengths, BATCH)),
    }
    computed = _padded(lengths, orders[how]) if how in orders else sum(lengths)
    return {
        "seconds": result.seconds,
        "tokens_per_second": result.tokens / result.seconds,
        "share_of_padding": 1 - sum(lengths) / computed,
        "trained_loss": result.losses[-1][1],
        "before": result.held_out_before,
        "after": result.held_out_after,
        "rows": len(texts),
    }


def _padded(lengths: list[int], order: list[int]) -> int:
    """Tokens computed for rows in this order, padding included."""
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)


def report(records: list[dict[str, Any]]) -> str:
    lines = [
        "# What padding costs",
        "",
        f"LoRA (r=8, all linear modules) on *sprout* in fp32, batches of {BATCH} rows, {EPOCHS} epochs: the demo's prompts and "
        "quotes, and 240 instructions with answers (alpaca_en), truncated to 256 tokens. "
        "Padded and packed runs see the same batches in the same order, so their losses must agree up to rounding; "
        "buckets use different batches. Token counts exclude padding; the share of padding is for one order of the rows.",
        "",
        "| batches | padding | real tokens/s | vs. padded | peak memory | last training loss | held-out loss |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    padded = {r["variant"].split(",")[0]: r for r in records if r["variant"].endswith("padded") and "error" not in r}
    for r in records:
        if "error" in r:
            lines.append(f"| {r['variant']} | failed: {r['error'][0]} | | | | | |")
            continue
        other = padded.get(r["variant"].split(",")[0])
        ratio = f"{r['tokens_per_second'] / other['tokens_per_second']:.2f}x" if other else ""
        cells = (r["variant"], f"{r['share_of_padding']:.0%}", f"{r['tokens_per_second']:,.0f}", ratio)
        cells += (f"{r['peak_mb']:.0f} MB", f"{r['trained_loss']:.4f}", f"{r['after']:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
