"""The notebook is its script, with the output inside."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "00_two_models_one_base.py"


def _tool():
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "tools" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_cells_are_the_script():
    notebook = json.loads(SCRIPT.with_suffix(".ipynb").read_text(encoding="utf-8"))
    expected = _tool().cells(SCRIPT.read_text(encoding="utf-8"))
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == expected, "run python tools/notebook.py examples/00_two_models_one_base.py"


def test_its_outputs_are_inside():
    cells = json.loads(SCRIPT.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    printing = [cell for cell in cells if cell["cell_type"] == "code" and "print" in "".join(cell["source"])]
    assert printing and all("".join(cell["outputs"][0]["text"]).strip() for cell in printing)


def test_cells_run_in_one_namespace_and_print_into_their_own():
    script = "# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\n\n# %%\nprint(x + 1)\n"
    tool = _tool()
    assert tool.cells(script) == [("markdown", "# Title\n\ntext"), ("code", "x = 1"), ("code", "print(x + 1)")]
    made = tool.as_notebook(script, tool.run(script, "script.py"))
    assert [cell.get("outputs") for cell in made["cells"]] == [
        None, [], [{"name": "stdout", "output_type": "stream", "text": ["2\n"]}]
    ]  # fmt: skip
