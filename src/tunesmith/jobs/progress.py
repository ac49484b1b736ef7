"""What a person sees of a job: a progress bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ..estimate.machine import peak_memory

SECONDS_BETWEEN_LINES = 20  # at most, in a log


@dataclass(frozen=True)
class JobConsole:
    """Where a job prints, and the title that its lines begin with."""

    title: str
    console: Console

    def print(self, text: str) -> None:
        self.console.print(f"{self.title}: {text}")


class ShowProgress(TrainerCallback):
    """Step, loss, speed, memory and time left; also keeps `losses`, the `(step, loss)` pairs logged.

    Args:
        tokens: of one epoch.
    """

    def __init__(self, output: JobConsole, tokens: int) -> None:
        self.output = output
        self.tokens = tokens
        self.tokens_done = 0
        self.losses: list[tuple[int, float]] = []
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self.last_line = time.monotonic()
        self.next_line = 0.0
        self.epoch_at_first = state.epoch or 0.0  # of a resumed run
        if self.output.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.output.console)
            self.bar.start()
            self.task = self.bar.add_task(self.output.title, total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tokens_done = round(self.tokens * (state.epoch - self.epoch_at_first))
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.losses.append((state.global_step, float(logs["loss"])))
        seconds, peak = time.monotonic() - self.started, peak_memory()
        text = f"loss {float(logs['loss']):.3f}, {self.tokens_done / max(seconds, 1e-9):,.0f} tokens/s"
        text += "" if peak is None else f", {peak / 1e6:,.0f} MB"
        if self.bar is not None:
            self.bar.update(self.task, loss=text)
        elif state.global_step >= self.next_line or time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.next_line, self.last_line = state.global_step + state.max_steps / 8, time.monotonic()
            self.output.print(f"step {state.global_step}/{state.max_steps}, {text}, {seconds:.0f} s")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal, however the training ended."""
        if self.bar is not None:
            self.bar.stop()
