"""The examples, each in a fresh process as a reader runs it, and the figures that they print."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DEMO = ROOT / "src" / "tunesmith" / "assets" / "demo"

# No example needs peft, which transformers' Trainer would import first (2 s of each process).
RUN = "import runpy, sys; sys.modules['peft'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def run(name: str, folder: Path, *arguments: str) -> str:
    """What the example prints; it writes into `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def figures(pattern: str, output: str) -> list[float]:
    found = re.search(pattern, output)
    assert found, output
    return [float(number) for number in found.groups()]


def test_two_models_one_base(tmp_path):
    with open(DEMO / "prompts.csv", encoding="utf-8", newline="") as file:
        rows = [row["prompt"].partition(".")[0] + "." for row in csv.DictReader(file)]
    with open(tmp_path / "short.csv", "w", encoding="utf-8", newline="") as file:  # first sentences: a third of the time
        csv.writer(file).writerows([["prompt"], *([row] for row in rows)])
    output = run("00_two_models_one_base.py", tmp_path, "--data", "short.csv")
    for name in ("prompts", "sentences"):
        before, after = figures(rf"{name}: held-out perplexity ([\d.]+) before, ([\d.]+) after", output)
        assert after < 0.9 * before
    assert output.count("trainable params: 1,280 ") == 2
    assert "the base is in memory once: True" in output
    assert (tmp_path / "two-models" / "prompts" / "adapter_model.safetensors").stat().st_size < 16_000


def test_lora_seq2seq(tmp_path):
    output = run("01_lora_seq2seq.py", tmp_path)
    assert "accuracy before: 0%" in output
    assert figures(r"accuracy after: (\d+)%", output)[0] >= 70  # always the same answer would be right in about half
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "complaints").iterdir()}


def test_chinese_prompt_tuning(tmp_path):
    output = run("02_chinese_prompt_tuning.py", tmp_path)
    before, after = figures(r"held-out loss on the answers: ([\d.]+) before, ([\d.]+) after", output)
    assert after < before - 1
    assert figures(r"resumed from checkpoint-8: ([\d.]+)", output) == [after]
    assert "Human: 考试有哪些技巧" in output


def test_every_method(tmp_path):
    output = run("04_every_method.py", tmp_path, "--steps", "14")
    losses = re.findall(r"^(.{30}) *[\d,]+ +[\d.]+ KB +([\d.]+) +([\d.]+)$", output, flags=re.MULTILINE)
    assert len(losses) == 23, output
    for name, before, after in losses:
        assert float(after) < float(before) - 0.02, name


def test_classifiers(tmp_path):
    output = run("05_classifiers.py", tmp_path)
    for name in ("opinions", "names"):
        before, after = figures(rf"{name}: accuracy (\d+)% before, (\d+)% after", output)
        assert before < 70 and after > 90


def test_image_classifier(tmp_path):
    before, after = figures(r"accuracy (\d+)% before, (\d+)% after", run("06_image_classifier.py", tmp_path))
    assert before < 50 and after > 80


def test_preferences(tmp_path):
    output = run("07_preferences.py", tmp_path)
    assert figures(r"reward model: (\d+)% .* before, (\d+)% after", output)[1] > 85
    before, after, right = figures(r"margin (-?[\d.]+) before, ([\d.]+) after; (\d+)%", output)
    assert before == 0 and after > 0.5 and right > 85  # without its adapter the policy is its reference, bit for bit


def test_less_memory(tmp_path):
    table = run("08_less_memory.py", tmp_path)
    totals = [float(line.split()[-1]) for line in table.splitlines()[1:]]
    assert len(totals) == 5 and totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0] / 10


def test_many_adapters_one_batch(tmp_path):
    output = run("09_many_adapters_one_batch.py", tmp_path)
    before, after = figures(r"step 1: loss ([\d.]+) .*\nstep 40: loss ([\d.]+)", output)
    assert after < before / 2
    for name, learned in {"sea": "waves", "hill": "windy path", "town": "town"}.items():
        assert learned in re.search(rf"^{name} .*$", output, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("[0-9]*.py")), ids=lambda path: path.stem)
def test_each_example_has_its_test_and_names_its_full_size_job(path):
    text = path.read_text(encoding="utf-8")
    assert "--base" in text and "one argument" in text.lower().replace("\n# ", " ").replace("\n", " ")
    assert any(path.name in test.read_text(encoding="utf-8") for test in Path(__file__).parent.glob("test_*.py"))
