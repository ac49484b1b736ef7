"""Runs that end before their time: killed, interrupted, diverged. What is on the disk is whole, and goes on bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from tunesmith.jobs import callbacks, checkpoints

ROWS = [
    {"instruction": f"Name a plant for garden {n}.", "input": "", "output": f"Plant {n % 7} grows well. " * (1 + n % 3)}
    for n in range(40)
]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"data: {tmp_path}/rows.json\nmethod: lora\nlora_dropout: 0.1\nbatch_size: 4\nepochs: 3\nmax_length: 64\n"
        "save_steps: 3\nlogging_steps: 1\n"
    )
    return path


def started(*arguments: object) -> subprocess.Popen:
    script = "from tunesmith.cli import main; main()"
    command = [sys.executable, "-c", script, "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


def finished(*arguments: object) -> tuple[int, str]:
    process = started(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def wait_for_step(process: subprocess.Popen, folder, step: int) -> None:
    """Until the run has done so many steps, or is over."""
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if any(record.get("step", 0) >= step for record in callbacks.read_metrics(folder / "metrics.jsonl")):
            return
        time.sleep(0.01)


@pytest.mark.parametrize("method", ["lora", "prompt-tuning"])
def test_a_killed_run_goes_on_bit_for_bit(method, recipe, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, printed = finished(recipe, "--method", method, "--output-dir", whole)
    assert code == 0, printed
    chance = random.Random(method)
    for _ in range(2):
        process = started(recipe, "--method", method, "--output-dir", cut, "--resume")
        before = [record["step"] for record in callbacks.read_metrics(cut / "metrics.jsonl")]
        wait_for_step(process, cut, max(before, default=0) + chance.randint(1, 8))
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was over before it was killed"
    code, printed = finished("--resume", "--output-dir", cut)  # the recipe is in the folder
    assert code == 0 and "resumed from" in printed, printed
    assert (cut / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert not (cut / checkpoints.STAGING).exists()
    steps = [record["step"] for record in callbacks.read_metrics(cut / "metrics.jsonl") if "loss" in record]
    assert steps == list(range(1, steps[-1] + 1)), "each step is recorded once"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(number, recipe, tmp_path):
    folder = tmp_path / "run"
    process = started(recipe, "--output-dir", folder, "--save-steps", 1000)
    wait_for_step(process, folder, 4)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, out + err
    assert "interrupted at step" in err and f"tunesmith train --resume --output-dir {folder}" in err and "Traceback" not in err
    (made,) = checkpoints.checkpoints(folder)
    assert f"step {made.name[11:]} of" in err and not (folder / WEIGHTS).exists()


def test_settings_and_data_must_be_the_same_to_go_on(recipe, tmp_path):
    folder = tmp_path / "run"
    assert finished(recipe, "--output-dir", folder, "--max-steps", 3)[0] == 0
    code, printed = finished(recipe, "--output-dir", folder, "--max-steps", 3)
    assert code == 2 and "--resume" in printed
    code, printed = finished(
        recipe, "--output-dir", folder, "--max-steps", 3, "--resume", "--learning-rate", "0.5", "--seed", 4
    )
    assert code == 2 and "learning_rate: was 0.002, is 0.5 now" in printed and "seed: was 0, is 4 now" in printed
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:-1]))
    code, printed = finished(recipe, "--output-dir", folder, "--max-steps", 3, "--resume")
    assert code == 2 and "the data file has changed" in printed


def test_a_run_that_diverges_stops_with_its_last_good_adapter(recipe, tmp_path):
    from safetensors.torch import load_file

    folder = tmp_path / "run"
    code, printed = finished(recipe, "--output-dir", folder, "--learning-rate", "1e30", "--max-grad-norm", "1e30")
    assert code == 5 and "lower --learning-rate" in printed and "Traceback" not in printed, printed
    assert all(torch.isfinite(value).all() for value in load_file(folder / "last-good" / WEIGHTS).values())
    assert not (folder / WEIGHTS).exists()
