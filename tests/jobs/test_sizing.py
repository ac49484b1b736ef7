"""Settings that fit into the memory there is."""

from __future__ import annotations

import json

import pytest

from tests.e2e.test_cli import run
from tunesmith import load_base, plan_training
from tunesmith.errors import ConfigError
from tunesmith.jobs import sizing
from tunesmith.jobs.settings import Settings


def test_settings_that_fit_are_found_and_can_be_pasted():
    settings = Settings("lora", base="Qwen2.5-0.5B", max_length=128, held_out=0.0)
    asked = plan_training(settings, sizing.Rows(100), "cpu").peak
    other, plan = sizing.fitting(settings, int(0.8 * asked), sizing.Rows(100), "cpu")
    assert plan.peak <= 0.8 * asked and other.per_device_train_batch_size < 8
    size = other.per_device_train_batch_size
    assert sizing.flags(other, settings) == f"--per-device-train-batch-size {size} --gradient-accumulation-steps {8 // size}"
    assert sizing.fitting(settings, 10**6, sizing.Rows(100), "cpu") is None


def test_activations_are_computed_twice_where_they_do_not_fit(monkeypatch):
    settings, base = Settings("lora"), load_base("sprout")
    asked = plan_training(settings)
    needed = asked.peak - asked.program - asked.base
    for free, expected in ((needed - 1, True), (needed + 1, False), (None, False)):
        monkeypatch.setattr(sizing, "available_memory", lambda device, free=free: free)
        assert sizing.needs_checkpointing(settings, base) is expected
    monkeypatch.setattr(sizing, "available_memory", lambda device: 16 * 10**9)
    monkeypatch.setattr(sizing, "plan_training", lambda settings: pytest.fail("planned, although there is plenty of memory"))
    assert not sizing.needs_checkpointing(settings, base)


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("16 GiB", 16 * 2**30), ("512mb", 512e6), ("1.5TB", 1.5e12)])
def test_sizes(text, size):
    assert sizing.bytes_of(text) == int(size)


@pytest.mark.parametrize("text", ["", "GB", "many", "-1GB", "nanGB", "24 gallons"])
def test_no_sizes(text):
    with pytest.raises(ConfigError, match="write 24GB"):
        sizing.bytes_of(text)


def test_the_verb_proposes_what_fits(tmp_path, capsys):
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "Name a plant.", "output": "A rose. " * 60}] * 20))
    arguments = ["plan", "--data", tmp_path / "rows.json", "--base", "gpt2", "--method", "lora", "--dtype", "bfloat16"]
    assert run(*arguments, "--budget", "1.5GB") == 0
    printed = capsys.readouterr().out
    assert "20 rows, counted as 256 tokens each" in printed and "124,439,808 parameters in bfloat16" in printed
    assert "does not fit in 1.5GB" in printed and "GB with --per-device-train-batch-size" in printed
    assert run("plan", "--budget", "1 gallon") == 2
    assert run("plan", "--base", "Llama-2-7Z") == 1
    assert "'Llama-2-7B'" in capsys.readouterr().err
    assert run("plan", "--models") == 0
    assert "whisper-large" in capsys.readouterr().out
