"""Write examples/NAME.ipynb from examples/NAME.py, with the output of running it from top to bottom.

python tools/notebook.py examples/00_two_models_one_base.py

`# %%` starts a code cell and `# %% [markdown]` a text cell. Cells run in one namespace in an empty folder; what they print is
kept, warnings are not.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any


def cells(script: str) -> list[tuple[str, str]]:
    """`(kind, source)` of each cell, kind "markdown" or "code"."""
    found = []
    for kind, body in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", script, flags=re.MULTILINE | re.DOTALL):
        if kind:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        found.append(("markdown" if kind else "code", body.strip()))
    return found


def as_notebook(script: str, outputs: list[str | None]) -> dict[str, Any]:
    """The notebook's JSON; `outputs` has what each cell printed, None for text."""
    made = []
    for number, ((kind, source), output) in enumerate(zip(cells(script), outputs, strict=True)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines(source)}
        if kind == "code":
            printed = {"name": "stdout", "output_type": "stream", "text": lines(output or "")}
            cell |= {"execution_count": sum(c["cell_type"] == "code" for c in made) + 1, "outputs": [printed] if output else []}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def run(script: str, name: str) -> list[str | None]:
    """What each cell prints."""
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs: list[str | None] = []
    for kind, source in cells(script):
        if kind == "markdown":
            outputs.append(None)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, name, "exec", dont_inherit=True), names)
        outputs.append(printed.getvalue())
    return outputs


def main(path: Path) -> None:
    script, target = path.read_text(encoding="utf-8"), path.resolve().with_suffix(".ipynb")
    sys.argv = [path.name]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        outputs = run(script, path.name)
        os.chdir(target.parent)
    target.write_text(json.dumps(as_notebook(script, outputs), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
