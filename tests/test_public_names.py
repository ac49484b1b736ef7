"""What `tunesmith` exports: the lazy table, the names for type checkers and `__all__` are one list, and mypy sees types."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tunesmith

SOURCE = Path(tunesmith.__file__)
PLACES: dict[str, str] = {name: module for module, names in tunesmith._PLACES.items() for name in names}

# Reading all of torch and transformers takes a minute; of torch, what `torch.no_grad` is decides the type of what it decorates.
MYPY = """
[mypy]
ignore_missing_imports = True
[mypy-torch.*,transformers.*,accelerate.*]
follow_imports = skip
[mypy-torch,torch.autograd,torch.autograd.grad_mode,torch.utils._contextlib]
follow_imports = silent
"""


def typed_names() -> dict[str, str]:
    """`{name: module}` of the imports under `if TYPE_CHECKING:`; each must be a re-export, `import Y as Y`."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for alias in node.names:
            assert alias.asname == alias.name and alias.name not in found
            found[alias.name] = node.module
    return found


def test_the_typed_names_are_the_lazy_ones():
    assert typed_names() == PLACES


def test_all_lists_every_public_name_once():
    assert len(PLACES) == sum(map(len, tunesmith._PLACES.values())), "a name stands in two places"
    assert tunesmith.__all__ == sorted(PLACES)
    assert set(dir(tunesmith)) == {*PLACES, "__version__"}


@pytest.mark.parametrize("name", sorted(PLACES))
def test_a_name_leads_to_what_it_says(name):
    assert getattr(tunesmith, name).__name__ == name


def test_the_mark_for_type_checkers_ships():
    assert (SOURCE.parent / "py.typed").is_file()
    project = SOURCE.parents[2] / "pyproject.toml"
    shipped = project.read_text(encoding="utf-8").partition("[tool.setuptools.package-data]")[2].partition("\n[")[0]
    assert re.search(r'^"?tunesmith"? = \["py.typed"\]$', shipped, flags=re.MULTILINE)


def test_mypy_sees_types(tmp_path):
    """In a user's script no public name is `Any`, and a config's fields have the types that they are declared with."""
    names = sorted(PLACES)
    lines = ["import tunesmith", *(f"reveal_type(tunesmith.{name})" for name in names)]
    lines += ["reveal_type(tunesmith.LoraConfig().r)", "tunesmith.LoraConfig(rr=8)"]
    (tmp_path / "script.py").write_text("\n".join(lines))
    (tmp_path / "mypy.ini").write_text(MYPY)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "--no-error-summary", "script.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": str(SOURCE.parents[1])}, capture_output=True, text=True,
    )  # fmt: skip
    revealed = re.findall(r'^script.py:(\d+): note: Revealed type is "(.*)"$', done.stdout, flags=re.MULTILINE)
    types = [text for _, text in revealed]
    assert len(types) == len(names) + 1, done.stdout + done.stderr
    assert not [name for name, text in zip(names, types) if text == "Any"]
    assert types[names.index("LoraConfig")].endswith("-> tunesmith.methods.lora_config.LoraConfig")
    assert types[names.index("PeftModel")].endswith("-> tunesmith.model.PeftModel")
    assert types[-1] in ("int", "builtins.int")
    assert 'Unexpected keyword argument "rr" for "LoraConfig"' in done.stdout
