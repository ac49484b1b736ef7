"""The README's table of benchmarks, generated from the available records."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import speed, startup

START, END = "<!-- benchmarks: written by benchmarks/summary.py -->", "<!-- end of benchmarks -->"


def table(records: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown; `records` are the medians of each case, by its name."""
    by_name = {record["variant"]: record for record in records.get("speed", []) if "error" not in record}
    lines = [
        "| training | real tokens/s | vs. `peft`, default | vs. `peft`, best | memory vs. `peft`, best |",
        "|---|---:|---:|---:|---:|",
    ]
    for job in speed.JOBS:
        own, default, best = (by_name.get(f"{job}: {side}") for side in ("Tunesmith", "peft, default", "peft, best"))
        if own and default and best:
            rate = own["tokens_per_second"]
            lines.append(
                f"| {speed.LABELS[job]} | {rate:.0f} "
                f"| {rate / default['tokens_per_second']:.1f}x | {rate / best['tokens_per_second']:.1f}x "
                f"| {own['peak_mb'] / best['peak_mb']:.2f}x |"
            )
    starts = {record["variant"]: record for record in records.get("startup", []) if "error" not in record}
    if len(starts) == 2:
        own_time, peer_time = (sum(starts[side][stage] for stage in startup.STAGES) for side in ("Tunesmith", "peft"))
        attached = starts["peft"]["attached"]
        stopped = f", stopped after attaching {attached:,}" if attached < startup.ADAPTERS else ""
        lines += [
            "",
            f"Importing, attaching {startup.ADAPTERS:,} adapters, loading one more and switching to another takes "
            f"{own_time:.1f} s; with `peft`, {peer_time:.1f} s{stopped}.",
        ]
    return "\n".join(lines)


def written_into(text: str, records: dict[str, list[dict[str, Any]]]) -> str:
    """The README's text with the table between its marks."""
    before, rest = text.split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n\n{table(records)}\n\n{END}{after}"
