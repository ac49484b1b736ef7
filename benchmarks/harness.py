"""Run a case: every variant in a fresh process, repeats interleaved; results as JSON lines, and a table from them.

    python -m benchmarks.harness learning
    python -m benchmarks.harness learning --only "LoRA" --repeats 3
    python -m benchmarks.harness learning --more       # another run, added to those recorded
    python -m benchmarks.harness learning --report     # only the table, from the recorded results

A case is a module of `benchmarks.cases` with

- `VARIANTS`: `{name: keyword arguments}`,
- `run(**arguments) -> dict`: one measurement, made in a process of its own,
- `report(records) -> str`: Markdown; `records` are the medians over the repeats,
- `PAGE`: the file below docs/ that holds the report.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "liger-kernel")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a benchmark case and write its results and its page.")
    parser.add_argument("case", choices=sorted(p.stem for p in (Path(__file__).parent / "cases").glob("[a-z]*.py")))
    parser.add_argument("--only", action="append", default=[], help="variants whose names contain this text; repeatable")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--more", action="store_true", help="keep the records of these variants and add runs to them")
    parser.add_argument("--report", action="store_true", help="write the page from the recorded results")
    arguments = parser.parse_args()
    case: Any = importlib.import_module(f"benchmarks.cases.{arguments.case}")
    path = RESULTS / f"{arguments.case}.jsonl"
    if not arguments.report:
        chosen = [name for name in case.VARIANTS if not arguments.only or any(text in name for text in arguments.only)]
        measure(arguments.case, chosen, arguments.repeats, path, arguments.more)
    kept = medians([json.loads(line) for line in path.read_text().splitlines()], list(case.VARIANTS))
    page = ROOT / "docs" / case.PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(case.report(kept) + "\n" + footer(arguments.case, kept))
    print(f"{path}\n{page}")
    update_readme()
    return int(any("error" in record for record in kept))


def update_readme() -> None:
    """Write the README's table from the records of all cases."""
    from benchmarks import summary

    records = {}
    for name in ("speed", "startup"):
        path = RESULTS / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        records[name] = medians(lines, list(importlib.import_module(f"benchmarks.cases.{name}").VARIANTS))
    readme = ROOT / "README.md"
    readme.write_text(summary.written_into(readme.read_text(), records))


def measure(case: str, variants: list[str], repeats: int, path: Path, more: bool = False) -> None:
    """Run each variant `repeats` times, one after the other in turns, and replace its lines in the results (or add some)."""
    path.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not more:
        lines = [record for record in lines if record["variant"] not in variants]
    for _ in range(repeats):
        for variant in variants:
            turn = sum(record["variant"] == variant for record in lines)
            record = {"variant": variant, "turn": turn, **in_fresh_process(case, variant), **environment()}
            print({key: value for key, value in record.items() if key not in environment()}, flush=True)
            lines.append(record)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def in_fresh_process(case: str, variant: str, checkout: Path = ROOT) -> dict[str, Any]:
    """What the variant's `run` returns in a checkout of this repository, with `peak_mb`: the most memory its process held."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        script = (
            "import importlib, json, sys\n"
            f"case = importlib.import_module('benchmarks.cases.{case}')\n"
            f"result = case.run(**case.VARIANTS[{variant!r}])\n"
            f"open({file.name!r}, 'w').write(json.dumps(result))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout / "src")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        errors = process.stderr.read() if process.stderr else b""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            return {"error": errors.decode().strip().splitlines()[-1:] or [f"exit {process.returncode}"]}
        return {**json.loads(file.read()), "peak_mb": usage.ru_maxrss / 1024}


def environment() -> dict[str, Any]:
    """Versions and machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    return {"versions": versions, "machine": f"{model}, {threads} of {os.cpu_count()} cores"}


def medians(records: list[dict[str, Any]], order: list[str]) -> list[dict[str, Any]]:
    """One record per variant in the case's order: medians of numbers, with `<name>_spread` (largest less smallest)."""
    merged = []
    for variant in order:
        own = [record for record in records if record["variant"] == variant]
        if not own:
            continue
        one = dict(own[-1])
        for key, value in own[-1].items():
            values = [record[key] for record in own if isinstance(record.get(key), (int, float))]
            if isinstance(value, float) and len(values) == len(own):
                one[key] = statistics.median(values)
                one[f"{key}_spread"] = max(values) - min(values)
        merged.append({**one, "repeats": len(own)})
    return merged


def footer(case: str, records: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in records[-1]["versions"].items()) if records else ""
    machine = records[-1]["machine"] if records else ""
    repeats = sorted({record["repeats"] for record in records}) or [0]
    runs = " to ".join(str(count) for count in dict.fromkeys((repeats[0], repeats[-1])))
    return (
        f"\nGenerated by `python -m benchmarks.harness {case}` on {machine}; {versions}. Each figure is the median of {runs} "
        f"run(s), each in a fresh process; the records are in `benchmarks/results/{case}.jsonl`.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
