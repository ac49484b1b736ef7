"""The same measurement with two checkouts of this repository, in turns, each in a fresh process: does a change cost anything?

    git worktree add ../before <commit>
    python -m benchmarks.compare ../before speed --only "LoRA r=16 all-linear, Qwen2.5-0.5B: Tunesmith" --pairs 5

For each figure the medians of both, and the median of the ratios within the pairs, which holds when the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, in_fresh_process


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare this checkout with another one.")
    parser.add_argument("before", type=Path, help="another checkout of this repository")
    parser.add_argument("case")
    parser.add_argument("--only", action="append", default=[], help="variants whose names contain this text; repeatable")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    case: Any = importlib.import_module(f"benchmarks.cases.{arguments.case}")
    for variant in case.VARIANTS:
        if any(text in variant for text in arguments.only):
            print(f"\n{variant}")
            compare(arguments.case, variant, arguments.before.resolve(), arguments.pairs)


def compare(case: str, variant: str, before: Path, pairs: int) -> None:
    """Print a line for each figure of the variant; which checkout goes first changes from pair to pair."""
    found: list[dict[Path, dict[str, Any]]] = []
    for pair in range(pairs):
        order = (before, ROOT) if pair % 2 == 0 else (ROOT, before)
        found.append({checkout: in_fresh_process(case, variant, checkout) for checkout in order})
        print(f"  pair {pair + 1}: {found[-1][before]} -> {found[-1][ROOT]}", flush=True)
    for name, value in found[0][ROOT].items():
        if isinstance(value, float):
            old, new = ([pair[checkout][name] for pair in found] for checkout in (before, ROOT))
            ratio = statistics.median(b / a for a, b in zip(old, new))
            print(f"  {name}: {statistics.median(old):.4g} before, {statistics.median(new):.4g} now, {ratio:.3f} times")


if __name__ == "__main__":
    main()
