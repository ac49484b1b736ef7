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
from tunesmith.jobs import report
from tunesmith.jobs.callbacks import RecordMetrics, read_metrics
from tunesmith.jobs.held_out import MeasureHeldOut
from tunesmith.jobs.settings import Settings

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


class Handle:
    """As much of a handle as is saved."""

    def __init__(self) -> None:
        self.saved = 0

    def save_pretrained(self, folder: str) -> None:
        self.saved += 1


def measuring(tmp_path, monkeypatch, losses, **settings):
    """The callback after as many steps as there are losses, and the step that ended the training."""
    losses, handle = iter(losses), Handle()
    monkeypatch.setattr("tunesmith.jobs.held_out.mean_loss", lambda *_: next(losses))
    chosen = Settings(eval_strategy="steps", eval_steps=1, **settings)
    callback = MeasureHeldOut(handle, [{}], 0, chosen, RecordMetrics(tmp_path))
    state, control = type("State", (), {"global_step": 0, "epoch": 0.0}), type("Control", (), {"should_training_stop": False})
    callback.on_train_begin(None, state, control)
    while not control.should_training_stop:
        state.global_step += 1
        try:
            callback.on_step_end(None, state, control)
        except StopIteration:
            return callback, handle, None
    return callback, handle, state.global_step


def test_a_training_ends_when_nothing_gets_better(tmp_path, monkeypatch):
    callback, handle, ended = measuring(
        tmp_path, monkeypatch, [3.0, 2.0, 2.5, 1.9, 2.0, 1.9, 1.0], early_stopping_patience=2, load_best_model_at_end=True
    )
    assert ended == 6 and callback.stopped and callback.best == (4, 1.9) and handle.saved == 3
    again, _, ended = measuring(tmp_path, monkeypatch, [1.95, 0.5], early_stopping_patience=2)
    assert again.measured[:2] == [(1, 3.0), (2, 2.0)], "what was measured before the checkpoint counts"


def test_not_a_number_is_never_the_best(tmp_path, monkeypatch):
    callback, handle, ended = measuring(tmp_path, monkeypatch, [float("nan"), 2.0, 3.0], load_best_model_at_end=True)
    assert ended is None and callback.best == (2, 2.0) and handle.saved == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--early-stopping-patience", 0], "above 0"),
        (["--early-stopping-patience", 2, "--held-out", 0], "needs measurements"),
        (["--load-best-model-at-end", "--eval-strategy", "no"], "needs measurements"),
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


def test_a_picture_of_strange_values_is_one():
    for points in ([], [(1, float("nan"))], [(1, 2.0)], [(1, 2.0), (2, 2.0)], [(1, float("inf")), (5, 1e30)], [(0, 1.0)]):
        drawn = report.picture({"training": points})
        assert "nan" not in drawn and "inf" not in drawn


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
