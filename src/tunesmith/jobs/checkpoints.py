"""Atomic checkpoints: a run killed at any moment resumes from the last one, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..storage.folder import flush
from . import processes

STAGING = ".checkpoint-staging"
STATE_FILE = "trainer_state.json"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name[11:]))


class WholeCheckpoints:
    """Put before a Trainer class: a checkpoint is staged, flushed to the disk and renamed; then old ones are removed.

    `TrainingArguments.save_total_limit` must be None; `keep` is the limit.
    """

    # Of the Trainer class behind this one.
    args: Any
    state: Any

    keep: int = 2
    _folder: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self.args.output_dir)
        self._only_main(self._clear_staging)
        self._folder = run / STAGING
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self._only_main(self._commit)
        except (OSError, RuntimeError, ValueError) as error:
            step = self.state.global_step
            raise UsageError(
                f"the checkpoint of step {step} cannot be written to {run} ({error}); earlier checkpoints are intact. "
                f"Free some space, then resume with: tunesmith train --resume --output-dir {run}"
            ) from error
        finally:
            self._folder = None
            if processes.is_main():
                self._clear_staging()
        if processes.is_main():
            for old in checkpoints(run)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    @staticmethod
    def _only_main(act: Callable[[], None]) -> None:
        """One process acts, between what all have done before and what all do afterwards."""
        processes.wait()
        if processes.is_main():
            act()
        processes.wait()

    def _clear_staging(self) -> None:
        shutil.rmtree(Path(self.args.output_dir) / STAGING, ignore_errors=True)

    def _commit(self) -> None:
        """Flush a staged checkpoint, to which every process has added its random states, and move it into place."""
        run = Path(self.args.output_dir)
        (made,) = (run / STAGING).glob("checkpoint-*")
        for path in (*made.rglob("*"), made):
            flush(path)
        shutil.rmtree(run / made.name, ignore_errors=True)
        made.rename(run / made.name)
