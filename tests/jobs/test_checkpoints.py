"""Checkpoints of a run: whole, or not there."""

from __future__ import annotations

import os

import pytest

from tunesmith.errors import UsageError
from tunesmith.jobs import checkpoints


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
