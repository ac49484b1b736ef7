"""Callbacks of a run: its records, and signals that end it."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..estimate.machine import peak_memory
from . import processes

METRICS_FILE = "metrics.jsonl"


class RecordMetrics(TrainerCallback):
    """Writes every record of a run into `metrics.jsonl`, a line each; a resumed run continues from its checkpoint's records.

    Of several processes one writes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.monotonic()
        if not processes.is_main():
            return
        kept = [record for record in read_metrics(self.path) if 0 < record.get("step", 0) <= state.global_step]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            peak = peak_memory()
            memory = {} if peak is None else {"peak_memory_mb": round(peak / 1e6, 1)}
            self.write(step=state.global_step, **logs, seconds=round(time.monotonic() - self.started, 3), **memory)

    def write(self, **values: Any) -> None:
        """Append one record."""
        if not processes.is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that a crash cut off is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class StopOnSignal(TrainerCallback):
    """While entered, SIGINT or SIGTERM ends the run after the current step, with a checkpoint; a second one at once."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if processes.agreed(self.received):
            self.received = True
            control.should_save = control.should_training_stop = True
