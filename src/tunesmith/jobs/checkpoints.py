"""Checkpoints that are whole or not there: a run killed at any moment goes on from the last one, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..storage.folder import flush

STAGING = ".checkpoint-staging"
STATE_FILE = "trainer_state.json"


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name[11:]))


class WholeCheckpoints:
    """Put before a Trainer class: a checkpoint is written aside, flushed to the disk and renamed; old ones go afterwards.

    `TrainingArguments.save_total_limit` is to be None; `keep` is the limit.
    """

    keep: int = 2
    _folder: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder or self.args.output_dir)  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self.args.output_dir)  # type: ignore[attr-defined]
        shutil.rmtree(run / STAGING, ignore_errors=True)
        self._folder = run / STAGING
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            (made,) = self._folder.glob("checkpoint-*")
            for path in (*made.rglob("*"), made):
                flush(path)
            shutil.rmtree(run / made.name, ignore_errors=True)
            made.rename(run / made.name)
        except (OSError, RuntimeError, ValueError) as error:
            step = self.state.global_step  # type: ignore[attr-defined]
            raise UsageError(
                f"the checkpoint of step {step} cannot be written into {run} ({error}); earlier ones are whole: make room, "
                f"then go on: tunesmith train --resume --output-dir {run}"
            ) from error
        finally:
            self._folder = None
            shutil.rmtree(run / STAGING, ignore_errors=True)
        for old in checkpoints(run)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
