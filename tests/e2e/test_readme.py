"""The README's Python snippets, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import MT5Config, MT5ForConditionalGeneration

from tests import tiny

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"<!-- test: snippet -->\n```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[0][:40])
def test_snippet_runs(snippet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "bigscience/mt0-large" in snippet:  # the hub is not reachable from tests: the same architecture, tiny
        MT5ForConditionalGeneration(MT5Config(**tiny.T5_SIZES)).save_pretrained("tiny-mt0")
        snippet = snippet.replace("bigscience/mt0-large", "./tiny-mt0")
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})
