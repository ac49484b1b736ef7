"""Kill a training run at random moments, resume it, and compare: the final adapter must match an uninterrupted run's, bit for
bit.

    python tools/kill_nine.py --kills 20 --method lora

Each kill is a SIGKILL up to two seconds after a random one of the remaining steps, start-up (step 0) and the final writing
included. A killed run is resumed, and may be killed again, until it ends; then another begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
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
    parser = argparse.ArgumentParser(description="Kill training runs at random moments, resume them, compare the adapters.")
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
    wait(start(recipe, place / "whole"), None)
    expected = (place / "whole" / WEIGHTS).read_bytes()
    steps = last_step(place / "whole")
    print(f"{method}: {steps} steps", flush=True)
    done = wrong = number = 0
    while done < kills:
        folder, own = place / f"cut-{number}", 0
        while not (folder / WEIGHTS).is_file():
            process = start(recipe, folder)
            moment = None if done == kills else (chance.randint(last_step(folder), steps), chance.uniform(0, 2))
            if wait(process, moment, folder):
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            done, own = done + 1, own + 1
            print(f"kill {done:2}: {state(folder)}", flush=True)
        same = (folder / WEIGHTS).read_bytes() == expected
        print(f"run {number}: ended after {own} kills, {'the same bits' if same else 'A DIFFERENT ADAPTER'}", flush=True)
        wrong, number = wrong + (not same), number + 1
    print(f"{done} kills, {number} runs, {wrong} differ from the uninterrupted run", flush=True)
    return wrong


def start(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from tunesmith.cli import main; main()", "train", str(recipe)]
    command += ["--output-dir", str(folder), "--resume"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait(process: subprocess.Popen[bytes], moment: tuple[int, float] | None, folder: Path | None = None) -> bool:
    """Whether the process ended by itself before its moment: `(steps, seconds after them)`."""
    while process.poll() is None and (moment is None or folder is None or last_step(folder) < moment[0]):
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=moment[1] if moment else None)
    if process.returncode not in (None, 0):
        raise RuntimeError(process.stderr.read().decode() if process.stderr else "")
    return process.returncode == 0


def last_step(folder: Path) -> int:
    """How far the records of a run go; the last line may be cut off."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [re.match(r'{"step": (\d+)', line) for line in lines]
    return max((int(match[1]) for match in found if match), default=0)


def state(folder: Path) -> str:
    """How far a killed run had got."""
    if not folder.is_dir():
        return "nothing written yet"
    found = sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name[11:]))
    ended = ", final adapter written" if (folder / WEIGHTS).is_file() else ""
    return f"step {last_step(folder)}, {found[-1] if found else 'no checkpoint'}{ended}"


if __name__ == "__main__":
    sys.exit(main())
