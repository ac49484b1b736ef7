"""Draw docs/images/*.svg: the output of commands, run now.

python tools/pictures.py            all of them, a few minutes
python tools/pictures.py tutorial   one

The tutorial's file and commands are those of docs/tutorial.md.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
WIDTH = 108
NOISE = re.compile(r"^(Loading weights|Writing model shards|Failed to load CPU gemm|loss curves|.*\bstep \d+/\d+)")

BAR = re.compile(r"━.* \S*\d+/\d+\S* ")  # a bar is drawn many times; the last one is kept


def printed(command: str, folder: str) -> str:
    """What a command prints on a terminal of this width, with colours."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "PYTHONPATH": str(ROOT / "src")}
    words = [sys.executable, "-c", "from tunesmith.cli import main; main()", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
    lines = [line for line in done.stdout.splitlines() if not NOISE.match(line)]
    following = [*lines[1:], ""]
    return "\n".join(line for line, after in zip(lines, following) if not (BAR.search(line) and BAR.search(after)))


def draw(name: str, commands: list[str], folder: str) -> None:
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True, color_system="truecolor")  # noqa: SIM115
    for command in commands:
        console.print(Text(f"$ {command}", style="bold"))
        console.print(Text.from_ansi(printed(command, folder)))
    picture = console.export_svg(title="tunesmith")
    # A reader's own monospaced font: the picture must not ask another site for one.
    picture = re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL)
    picture = picture.replace("font-family: Fira Code, monospace", "font-family: ui-monospace, Menlo, Consolas, monospace")
    IMAGES.mkdir(parents=True, exist_ok=True)
    (IMAGES / f"{name}.svg").write_text(picture, encoding="utf-8")
    print(IMAGES / f"{name}.svg")


def tutorial(folder: str) -> list[str]:
    """The tutorial's commands; its data file is written into `folder`."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for name, body in re.findall(r"<!-- test: file (\S+) -->\n```\w+\n(.*?)```", page, flags=re.DOTALL):
        Path(folder, name).write_text(body, encoding="utf-8")
    blocks = re.findall(r"<!-- test: commands -->\n```sh\n(.*?)```", page, flags=re.DOTALL)
    return [command for block in blocks for command in block.strip().replace("\\\n ", "").splitlines()]


def main(wanted: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if "demo" in wanted:
            draw("demo", ["tunesmith demo"], folder)
        if "tutorial" in wanted:
            validate, *train_and_talk = tutorial(folder)
            draw("validate", [validate], folder)
            draw("tutorial", train_and_talk[:3], folder)


if __name__ == "__main__":
    main(sys.argv[1:] or ["demo", "tutorial"])
