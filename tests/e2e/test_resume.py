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

from tunesmith.errors import DivergedError, UsageError
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
    assert code == 0 and "going on from" in printed, printed
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
    assert code == 2 and "learning_rate: 0.002 there, 0.5 now" in printed and "seed: 0 there, 4 now" in printed
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


def test_what_is_told_as_divergence():
    steady = callbacks.Divergence(patience=3)
    assert [steady.reason(loss) for loss in [2.0, 2.2, 1.8, 9.0, 9.0, 1.0, 9.0, 9.0]] == [None] * 8
    assert "began at 1.8" in str(steady.reason(9.0))
    assert callbacks.Divergence().reason(float("nan")) == "the loss is nan"
    assert callbacks.Divergence().reason(float("inf")) == "the loss is inf"


class FakeTrainer:
    """As much of a Trainer as a checkpoint needs."""

    def __init__(self, folder, fails=False) -> None:
        self.args = type("Arguments", (), {"output_dir": str(folder)})
        self.state = type("State", (), {"global_step": 0})
        self.fails = fails

    def _save_checkpoint(self, model, trial) -> None:
        from pathlib import Path

        made = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        made.mkdir(parents=True)
        (made / "first").write_text("1")
        if self.fails:
            raise OSError(28, "No space left on device")
        (made / checkpoints.STATE_FILE).write_text("{}")


class Whole(checkpoints.WholeCheckpoints, FakeTrainer):
    pass


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path):
    trainer = Whole(tmp_path)
    for trainer.state.global_step in (5, 10, 15):
        trainer._save_checkpoint(None, None)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-15"]
    trainer.fails, trainer.state.global_step = True, 20
    with pytest.raises(UsageError, match=r"checkpoint of step 20 .*No space left.* --resume"):
        trainer._save_checkpoint(None, None)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-15"]


def test_a_checkpoint_without_its_state_is_none(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.checkpoints(tmp_path) == []


class LossElsewhere:
    """A loss on an accelerator: to read it is to wait for it."""

    device = torch.device("cuda")

    def __init__(self, value, read) -> None:
        self.value, self.read = value, read

    def detach(self):
        return self

    def float(self):
        self.read.append(self.value)
        return torch.tensor(self.value)


class Steps:
    """As much of a Trainer as takes steps; the weight before a step is the step's number."""

    def __init__(self, losses, logging_steps) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.state = type("State", (), {"global_step": 0})
        self.args = type("Arguments", (), {"logging_steps": logging_steps})
        self.losses, self.saved = losses, []

    def training_step(self, model, inputs, num_items_in_batch=None):
        return self.losses[self.state.global_step]

    def _save_checkpoint(self):
        self.saved.append(self.state.global_step)


class Watched(callbacks.StopsWhenDiverging, Steps):
    def steps(self, *numbers) -> None:
        for step in numbers:
            self.state.global_step = step
            self.model.weight.data.fill_(step)
            self.training_step(self.model, {})


def test_weights_that_were_good_are_put_back():
    trainer = Watched([torch.tensor(loss) for loss in (1.0, 1.0, float("nan"))], logging_steps=1)
    trainer.steps(0, 1)
    with pytest.raises(DivergedError, match="step 3: the loss is nan") as caught:
        trainer.steps(2)
    assert caught.value.good_step == 1 and trainer.model.weight.item() == 1.0


def test_an_accelerators_losses_are_read_where_a_record_is_due_and_before_a_checkpoint():
    read = []
    trainer = Watched([LossElsewhere(loss, read) for loss in (1.0, 1.1, 1.2, 1.3, float("nan"))], logging_steps=3)
    trainer.steps(0, 1, 2)
    assert read == [1.0]
    trainer.steps(3)
    assert read == [1.0, 1.1, 1.2, 1.3]
    trainer._save_checkpoint()
    trainer.steps(4)
    assert len(read) == 4
    with pytest.raises(DivergedError, match="step 5: the loss is nan"):
        trainer._save_checkpoint()
    assert trainer.saved == [3] and trainer.model.weight.item() == 3.0
