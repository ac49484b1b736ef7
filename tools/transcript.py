"""A newcomer's path as a page: every command with what it printed and how long it took, run on your own files.

    python tools/transcript.py --conversations alpaca.json --other-language alpaca_zh.json --texts prompts.csv --column prompt

Nothing is edited but paths, which are shortened. The page is docs/transcript.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_LINES = 40  # of one command's output


def main() -> int:
    parser = argparse.ArgumentParser(description="Walk the tool's path on data files and write what was seen.")
    parser.add_argument("--conversations", type=Path, required=True, help="questions and answers: the whole path")
    parser.add_argument("--other-language", type=Path, help="questions and answers, validated and trained on for a moment")
    parser.add_argument("--texts", type=Path, help="csv of plain texts")
    parser.add_argument("--column", default="prompt", help="the column of --texts")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "transcript.md")
    arguments = parser.parse_args()
    files = [path for path in (arguments.conversations, arguments.other_language, arguments.texts) if path]
    with tempfile.TemporaryDirectory() as folder:
        for path in files:
            (Path(folder) / path.name).symlink_to(path.resolve())
        walk = Walk(Path(folder))
        walked(walk, arguments)
    arguments.output.write_text(walk.page(shlex.join(["python", "tools/transcript.py", *sys.argv[1:]])), encoding="utf-8")
    return walk.unexpected


class Walk:
    """Commands run one after the other in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[str] = []
        self.unexpected = 0
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        self.parts.append(text)

    def run(self, line: str, code: int | None = 0, interrupt_at: int | None = None, typed: str | None = None) -> None:
        """Run `tunesmith <line>`; SIGINT comes once `interrupt_at` steps are recorded."""
        print(f"$ tunesmith {line}", flush=True)
        command = [sys.executable, "-c", "from tunesmith.cli import main; main()", *shlex.split(line)]
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=self.folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100", "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        if interrupt_at is not None:
            records = next(self.folder / name / "metrics.jsonl" for name in line.split() if name.startswith("my-"))
            while process.poll() is None and not (records.is_file() and f'"step": {interrupt_at}' in records.read_text()):
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(typed)
        seconds = time.monotonic() - started
        self.unexpected += code is not None and process.returncode != code
        lines = printed.replace(str(self.folder) + "/", "").rstrip().splitlines()
        lines = lines if len(lines) <= MOST_LINES else [*lines[:MOST_LINES], f"... {len(lines) - MOST_LINES} more lines"]
        asked = f" <<< {shlex.quote(typed)}" if typed else ""
        note = " (Ctrl-C)" if interrupt_at is not None else ""
        ended = f"[{seconds:.1f} s, exit code {process.returncode}{note}]"
        self.parts.append("\n".join(["```text", f"$ tunesmith {line}{asked}", *map(str.rstrip, lines), ended, "```"]))

    def page(self, command: str) -> str:
        head = (
            "# A newcomer's transcript\n\nWhat each command printed and how long it took, start-up included "
            f"({os.cpu_count()} cores; {time.monotonic() - self.started:.0f} s in all). Made by\n\n```sh\n{command}\n```"
        )
        return "\n\n".join([head, *self.parts]) + "\n"


def walked(walk: Walk, arguments: argparse.Namespace) -> None:
    data, steps = arguments.conversations.name, arguments.steps
    train = (
        f"train --data {data} --skip-bad-rows --method lora --batch-size 4 --max-length 128 --held-out 0.02 --max-steps {steps}"
    )
    walk.say("## Is the data sound?")
    walk.run(f"validate {data} --max-length 128", code=None)
    walk.say("## What will it take?")
    walk.run(f"plan --data {data} --skip-bad-rows --method lora --batch-size 4 --max-length 128 --max-steps {steps}")
    walk.run(f"plan --data {data} --skip-bad-rows --base Qwen2.5-0.5B --method lora --budget 3GB --device cpu")
    walk.say("## Training, interrupted and gone on with")
    walk.run(f"{train} --save-steps 4 --logging-steps 2 --output-dir my-adapter", code=130, interrupt_at=steps // 3)
    walk.run("train --resume --output-dir my-adapter")
    walk.say("## Was it worth it?")
    walk.run(f"eval --data {data} --skip-bad-rows --adapter my-adapter --max-length 64 --samples 1 --max-rows 40")
    walk.run("chat --adapter my-adapter --max-new-tokens 30", typed="Write a function that adds two numbers.\n/quit\n")
    walk.say("## What is in it, and where can it go?")
    walk.run("inspect my-adapter")
    walk.run("merge --adapter my-adapter --output-dir merged")
    walk.run("export my-adapter --output-dir for-peft --dtype float16")
    if arguments.other_language:
        name = arguments.other_language.name
        walk.say("## Another language")
        walk.run(f"validate {name} --max-length 256")
        walk.run(f"train --data {name} --batch-size 2 --max-steps 4 --held-out 0.01 --max-length 128 --output-dir my-other")
    if arguments.texts:
        name, column = arguments.texts.name, arguments.column
        walk.say("## Plain texts")
        walk.run(f"validate {name}", code=3)
        walk.run(f"train --data {name} --text-column {column} --max-steps 6 --batch-size 4 --output-dir my-texts")
        walk.run('generate --adapter my-texts --prompt "I want you to act as" --max-new-tokens 30 --compare')


if __name__ == "__main__":
    sys.exit(main())
