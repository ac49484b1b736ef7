"""Measurements while training, the best adapter, early stopping, and the page of a run, looked at in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.test_cli import run
from tunesmith.jobs.callbacks import read_metrics

ROWS = [{"instruction": f"Name plant {n} & <b>more</b>.", "output": f"Plant {n % 5} is a rose."} for n in range(24)]
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("best")
    (place / "rows.json").write_text(json.dumps(ROWS))
    arguments = ["--data", place / "rows.json", "--method", "lora", "--batch-size", 4, "--epochs", 4, "--max-length", 64]
    high = ["--learning-rate", 0.05, "--lr-scheduler-type", "constant", "--load-best-model-at-end", "--samples", 2]
    assert run("train", *arguments, *high, "--held-out", 0.3, "--output-dir", place / "run") == 0
    return place / "run"


def test_the_best_adapter_is_the_final_one(folder):
    measured = [record for record in read_metrics(folder / "metrics.jsonl") if "eval_loss" in record]
    assert [record["step"] for record in measured] == [5, 10, 15, 20], "after each epoch"
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert last["held_out_loss_after"] == pytest.approx(min(record["eval_loss"] for record in measured), abs=1e-6)
    final, best = (load_file(place / "adapter_model.safetensors") for place in (folder, folder / "best"))
    assert all(torch.equal(final[name], best[name]) for name in best)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--early-stopping-patience", 0], "above 0"),
        (["--early-stopping-patience", 2, "--held-out", 0], "needs evaluations"),
        (["--load-best-model-at-end", "--eval-strategy", "no"], "needs evaluations"),
        (["--eval-strategy", "epochs"], "did you mean 'epoch'"),
        (["--report-to", "tensorbord"], "tensorboard or wandb"),
    ],
)
def test_settings_that_cannot_be(arguments, words, capsys):
    assert run("train", "--data", "x.json", *arguments, "--dry-run") == 2
    assert words in capsys.readouterr().err


class Page(HTMLParser):
    """Every tag and address of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]


def test_the_page_needs_nothing_else_and_says_everything(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not page.addresses and not {"script", "link", "img"} & set(page.tags) and "url(" not in text
    assert page.tags.count("svg") == 2 and page.tags.count("polyline") == 3
    assert "&lt;b&gt;more&lt;/b&gt;" in text and "<b>" not in text, "what the data says is text"
    assert "learning_rate: 0.05" in text and "held-out perplexity" in text and text.count('<td class="text">') == 2 * 4


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_page(folder, tmp_path):
    page = f"file://{folder / 'report.html'}"
    options = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run([*options, "--dump-dom", page], capture_output=True, text=True, timeout=300).stdout
    assert "Held-out rows, before and after" in shown and len(re.findall("<polyline", shown)) == 3
    picture = tmp_path / "page.png"
    subprocess.run(
        [*options, f"--screenshot={picture}", "--window-size=900,1800", page], check=True, capture_output=True, timeout=300
    )
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 30_000
