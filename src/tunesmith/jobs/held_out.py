"""Evaluation on held-out rows during a run: keeps the best adapter, and ends the run when nothing gets better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..data.text import mean_loss, perplexity
from ..model import PeftModel
from ..train.trainer import load_all
from . import processes
from .callbacks import METRICS_FILE, RecordMetrics, read_metrics
from .settings import Settings

BEST = "best"  # the folder of the best adapter so far


class MeasureHeldOut(TrainerCallback):
    """After each epoch, or every `eval_steps`: records the held-out loss, and saves the adapter to `best/` if it is the best.

    A resumed run reads the measurements before its checkpoint from its records. An adapter of later steps in `best/` is
    trained again, bit for bit, and saved again.

    Args:
        record: where measurements are written; must come before this among a trainer's callbacks.
    """

    def __init__(
        self, handle: PeftModel, rows: Sequence[dict[str, list[int]]], pad_id: int, settings: Settings, record: RecordMetrics
    ) -> None:
        self.handle = handle
        self.rows = rows
        self.pad_id = pad_id
        self.settings = settings
        self.record = record
        self.measured: list[tuple[int, float]] = []
        self.stopped = False

    @property
    def folder(self) -> Path:
        return self.record.path.parent / BEST

    @property
    def best(self) -> tuple[int, float]:
        """`(step, loss)` of the best finite measurement."""
        return min((at for at in self.measured if math.isfinite(at[1])), key=lambda at: at[1], default=(0, math.inf))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        processes.wait()  # for the one that writes
        records = read_metrics(self.folder.parent / METRICS_FILE)
        self.measured = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before a checkpoint of the same step, so that a run resumed from it has the measurement."""
        of_epoch = self.settings.eval_strategy == "epoch"
        if abs(state.epoch - round(state.epoch)) < 1e-6 if of_epoch else state.global_step % self.settings.eval_steps == 0:
            self._measure(state, control)

    def _measure(self, state: Any, control: Any) -> None:
        loss, best = processes.agreed(mean_loss(self.handle, self.rows, self.pad_id)), self.best[1]
        self.measured.append((state.global_step, loss))
        self.record.write(step=state.global_step, eval_loss=loss)
        if loss < best and self.settings.load_best_model_at_end:
            self.handle.save_pretrained(str(self.folder), is_main_process=processes.is_main())
        patience = self.settings.early_stopping_patience
        since = sum(step > self.best[0] for step, _ in self.measured)
        if patience is not None and since >= patience:
            control.should_training_stop = self.stopped = True

    def known(self, step: int) -> float | None:
        """The held-out loss of the adapter after `take_best` at the end of `step`; None where it was not measured."""
        if self._takes_best():
            return self.best[1]
        return dict(self.measured).get(step)

    def _takes_best(self) -> bool:
        return self.settings.load_best_model_at_end and math.isfinite(self.best[1])

    def take_best(self) -> str | None:
        """Load the best adapter where that was asked for; returns a sentence about it."""
        if not self._takes_best():
            return None
        processes.wait()  # for the one that writes
        load_all(self.handle, str(self.folder))
        step, loss = self.best
        return f"kept the adapter of step {step}, the best on held-out rows: perplexity {perplexity(loss):.1f}"
