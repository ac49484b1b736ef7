"""A base in 4 or 8 bits on the command line: trained on, spoken with, and what is wrong with the settings."""

from __future__ import annotations

import json
import re

import pytest

from tests.e2e.test_cli import run
from tunesmith import PeftModel, load_base
from tunesmith.assets import FOLDER
from tunesmith.bases.loading import stored_in
from tunesmith.bases.quantised import quantised_views
from tunesmith.errors import UsageError

pytest.importorskip("bitsandbytes")
ROWS = [{"text": f"Plant {n % 5} is a rose and it grows in the garden."} for n in range(10)]
TRAIN = ["train", "--method", "lora", "--max-steps", "2", "--held-out", "0.2"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return "rows.jsonl"


@pytest.mark.parametrize(("flag", "bits"), [("--load-in-4bit", 4), ("--load-in-8bit", 8)])
def test_train_and_eval(flag, bits, data, capsys):
    assert run(*TRAIN, "--data", data, flag, "--optim", "paged_adamw_8bit", "--output-dir", "out") == 0
    printed = capsys.readouterr().out
    assert f"stored in {bits} bits" in printed and "held-out perplexity" in printed
    handle = PeftModel.from_pretrained(load_base("sprout", **stored_in(bits)), "out")
    assert sum(1 for _ in quantised_views(handle.bare_base)) == 42
    if bits == 4:
        assert run("eval", "--data", data, "--adapter", "out", flag) == 0
        assert "perplexity" in capsys.readouterr().out


def test_4_bits_cost_at_most_2_percent_of_held_out_perplexity(tmp_path, capsys):
    """Of sprout, trained alike on the demo's prompts. The whole job: 78.9 -> 34.7 in 16 bits, 78.2 -> 34.8 in 4 (docs)."""
    job = ["train", "--data", FOLDER / "demo" / "prompts.csv", "--text-column", "prompt", "--method", "lora", "--lora-r", "16"]
    job += ["--lora-target-modules", "all-linear", "--max-steps", "20", "--max-length", "64", "--dtype", "bfloat16"]
    found = {}
    for flag in ("--no-load-in-4bit", "--load-in-4bit"):
        assert run(*job, flag, "--output-dir", tmp_path / flag.strip("-")) == 0
        found[flag] = [float(n) for n in re.search(r"perplexity ([\d.]+) -> ([\d.]+)", capsys.readouterr().out).groups()]
    (before, dense), (_, quantised) = found.values()
    assert dense < 0.75 * before
    assert quantised <= 1.02 * dense


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--load-in-4bit", "--load-in-8bit"], ["load_in_4bit and load_in_8bit are both set"]),
        (["--load-in-4bit", "--bnb-4bit-quant-type", "nf5"], ['"nf5" is unknown', "nf4 or fp4"]),
        (["--optim", "paged_adamw_32bits"], ['optim "paged_adamw_32bits" is unknown', "did you mean 'paged_adamw_32bit'"]),
    ],
)
def test_wrong_settings(flags, words, data, capsys, tmp_path):
    assert run(*TRAIN, "--data", data, "--output-dir", "out", *flags) == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in words), printed
    assert not (tmp_path / "out").exists()


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'4-bit base needs bitsandbytes.*pip install "tunesmith\[quant\]"'):
        stored_in(4)
    assert stored_in(16) == {}
