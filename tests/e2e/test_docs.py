"""The pages of docs/, run as they stand, and those that are generated, compared with their sources.

What runs is marked in the page: `<!-- test: snippet -->` before Python, `<!-- test: file NAME -->` before a file's content,
`<!-- test: commands -->` before lines of `tunesmith ...`. One page runs in one folder and one namespace.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_cli import run

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MARKED = re.compile(r"<!-- test: (snippet|commands|file \S+) -->\n```\w+\n(.*?)```", flags=re.DOTALL)
OWN_TEST = {"add-a-method.md"}  # tests/e2e/test_add_a_method.py
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page.name not in OWN_TEST and MARKED.search(page.read_text("utf-8"))]


def run_page(text: str, name: str) -> None:
    names: dict = {"__name__": "__main__"}
    for kind, body in MARKED.findall(text):
        if kind == "snippet":
            exec(compile(body, name, "exec", dont_inherit=True), names)
        elif kind == "commands":
            for line in body.strip().replace("\\\n", " ").splitlines():
                assert line.startswith("tunesmith "), line
                assert run(*shlex.split(line)[1:]) == 0, line
        else:
            Path(kind.removeprefix("file ")).write_text(body, encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text("utf-8"), page.name)


def test_pages_that_must_run_do():
    assert {"index", "tutorial", "own-data", "choosing-a-method", "switch-mix-merge", "classifiers", "resume", "train-faster",
            "migration"} <= {page.stem for page in PAGES}  # fmt: skip


@pytest.mark.parametrize("body", ["print(undefined_name)", "assert 1 == 2"])
def test_a_faulty_snippet_fails(body):
    with pytest.raises((NameError, AssertionError)):
        run_page(f"<!-- test: snippet -->\n```python\n{body}\n```", "page.md")


def test_the_reference_is_current():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for name, text in reference.pages().items():
        written = (DOCS / "reference" / name).read_text("utf-8")
        assert written == text, f"docs/reference/{name} is not current: run python tools/reference.py"
    assert not any("| `r` | `int` | `8` |  |" in text for text in reference.pages().values())  # each own field is described


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'tunesmith[docs]'")
    pytest.importorskip("material", reason="pip install 'tunesmith[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr + built.stdout
    assert "Tutorial" in (tmp_path / "site" / "tutorial.html").read_text("utf-8")
