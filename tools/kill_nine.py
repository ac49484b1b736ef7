"""Kill a training at random moments, go on, and compare: the final adapter must be the uninterrupted run's, bit for bit.

    python tools/kill_nine.py --kills 20 --method lora

Each kill is SIGKILL at a moment drawn from the whole length of a run, start-up included. A killed run is gone on with, and may
be killed again, until it ends; then another begins.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = [
    {"instruction": f"Name a plant for garden {n}.", "input": "", "output": f"Plant {n % 7} grows well. " * (1 + n % 3)}
    for n in range(40)
]
RECIPE = "lora_dropout: 0.1\nbatch_size: 4\nepochs: 3\nmax_length: 64\nsave_steps: 3\nlogging_steps: 1\n"
WEIGHTS = "adapter_model.safetensors"


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a training at random moments and compare what comes of it.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), arguments.kills, arguments.method, random.Random(arguments.seed))


def compare(place: Path, kills: int, method: str, chance: random.Random) -> int:
    """The number of final adapters that differ."""
    (place / "rows.json").write_text(json.dumps(ROWS))
    recipe = place / "recipe.yaml"
    recipe.write_text(f"data: {place}/rows.json\nmethod: {method}\n{RECIPE}")
    started = time.monotonic()
    finish(start(recipe, place / "whole"))
    length, expected = time.monotonic() - started, (place / "whole" / WEIGHTS).read_bytes()
    print(f"{method}: uninterrupted {length:.1f} s", flush=True)
    done = wrong = number = 0
    while done < kills:
        folder = place / f"cut-{number}"
        own = 0
        while True:
            process = start(recipe, folder)
            moment = chance.uniform(0, length) if done < kills else 1e9
            if wait(process, moment):
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            done, own = done + 1, own + 1
            print(f"kill {done:2} after {moment:4.1f} s: {state(folder)}", flush=True)
        assert process.returncode == 0, process.stderr.read().decode() if process.stderr else ""
        same = (folder / WEIGHTS).read_bytes() == expected
        print(f"run {number}: ended after {own} kills, {'the same bits' if same else 'ANOTHER ADAPTER'}", flush=True)
        wrong, number = wrong + (not same), number + 1
    print(f"{done} kills, {number} runs, {wrong} differ from the uninterrupted one", flush=True)
    return wrong


def start(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from tunesmith.cli import main; main()", "train", str(recipe)]
    command += ["--output-dir", str(folder), "--resume"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ended by itself within so many seconds."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def finish(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    assert process.returncode == 0, process.stderr.read().decode() if process.stderr else ""


def state(folder: Path) -> str:
    """How far a killed run had come."""
    if not folder.is_dir():
        return "nothing written yet"
    found = sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name[11:]))
    return f"{found[-1] if found else 'no checkpoint'}{', final adapter written' if (folder / WEIGHTS).is_file() else ''}"


if __name__ == "__main__":
    sys.exit(main())
