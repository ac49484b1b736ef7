"""`tunesmith train` under torchrun: the run of one process, with its batches shared out, and one writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.bad_input import one_error
from tunesmith import ConfigError, UsageError
from tunesmith.jobs import processes
from tunesmith.jobs.callbacks import read_metrics
from tunesmith.jobs.recipe import RECIPE_FILE, read_recipe
from tunesmith.jobs.run_folder import RunFolder, file_hash
from tunesmith.jobs.settings import Settings

COMMAND = "from tunesmith.cli import main; main()"
SETTINGS = (
    "--method", "lora", "--dtype", "float32", "--max-length", "48", "--logging-steps", "1", "--save-steps", "2",
    "--held-out", "0.25", "--eval-strategy", "steps", "--eval-steps", "2", "--load-best-model-at-end", "--samples", "1",
)  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"What is {n} plus one?", "completion": f" It is {n + 1}."}) for n in range(16)]
    path.write_text("\n".join(lines))
    return path


def finished(arguments: list[str], launcher: list[str], **environment: str) -> tuple[int, str]:
    """Exit code and output of a command in one process, or in those that `launcher` starts."""
    run = subprocess.run(
        [sys.executable, *launcher, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return run.returncode, run.stdout


@pytest.fixture
def torchrun(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]


@pytest.mark.parametrize("packing", ["--packing", pytest.param("--no-packing", marks=pytest.mark.matrix)])
def test_two_processes_do_what_one_does_and_write_one_folder(packing, rows, torchrun, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["train", "--data", str(rows), packing, *SETTINGS]
    code, printed = finished(
        [*common, "--max-steps", "4", "--per-device-train-batch-size", "4", "--output-dir", str(one)], ["-c", COMMAND]
    )
    assert code == 0, printed
    together = [*common, "--per-device-train-batch-size", "2", "--output-dir", str(two)]
    code, printed = finished([*together, "--max-steps", "4"], torchrun)
    assert code == 0, printed
    assert printed.count("report:") == 1 and printed.count("step 1/4") == 1

    before, after = ([_measured(record) for record in read_metrics(folder / "metrics.jsonl")] for folder in (one, two))
    assert len(before) == len(after) == 7
    for expected, found in zip(before, after):
        assert found == pytest.approx(expected, rel=1e-4), (before, after)
    expected, found = load_file(one / "adapter_model.safetensors"), load_file(two / "adapter_model.safetensors")
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 2e-4, name
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert {p.name for p in (two / "checkpoint-4").glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}

    settings = Settings(**{name: value for name, value in read_recipe(two / RECIPE_FILE).items() if value is not None})
    with one_error(ConfigError, "processes: were 2, are 1 now"):
        RunFolder(two).check_same(settings, file_hash(rows))


def _measured(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name == "step" or "loss" in name}


def test_processes_that_cannot_be_connected_are_refused_before_anything_is_written(rows, tmp_path):
    out = tmp_path / "out"
    arguments = ["train", "--data", str(rows), "--max-steps", "1", "--output-dir", str(out)]
    code, printed = finished(arguments, ["-c", COMMAND], WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert code == 1 and "WORLD_SIZE is 2" in printed and "torchrun" in printed
    assert not out.exists()


def test_other_commands_run_in_one_process(monkeypatch):
    processes.check_alone("merge")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with one_error(UsageError, "tunesmith merge runs in one process, but the launcher has started 2"):
        processes.check_alone("merge")
