"""What looks after a run: its records, signals that end it, and losses that are none."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..errors import DivergedError

METRICS_FILE = "metrics.jsonl"


class RecordMetrics(TrainerCallback):
    """Writes every record of the training into `metrics.jsonl`, a line each; a resumed run goes on where its checkpoint was."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.monotonic()
        kept = [record for record in read_metrics(self.path) if 0 < record.get("step", 0) <= state.global_step]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.write(step=state.global_step, **logs, seconds=round(time.monotonic() - self.started, 3), **peak_memory())

    def write(self, **values: Any) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def peak_memory() -> dict[str, float]:
    """Peak memory of the accelerator, or of the process, in MB."""
    if torch.cuda.is_available():
        return {"peak_memory_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1)}
    held = most_resident()
    return {} if held is None else {"peak_memory_mb": round(held / 1e6, 1)}


def most_resident() -> int | None:
    """Bytes that this process held at most; None where the system does not tell."""
    try:  # the process's own: what `resource` tells on Linux begins with that of the process that started it
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class StopOnSignal(TrainerCallback):
    """While entered, SIGINT and SIGTERM end the training after the step at hand, with a checkpoint; a second one at once."""

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
        if self.received:
            control.should_save = control.should_training_stop = True


class Divergence:
    """Tells from the losses of steps whether a training is lost.

    Args:
        patience: how many steps in a row must be far above the first ones.
    """

    FIRST = 3  # steps whose lowest loss is where a training began
    FAR = 3.0  # nats: a perplexity twenty times as high

    def __init__(self, patience: int = 20) -> None:
        self.patience = patience
        self.first: list[float] = []
        self.high = 0

    def reason(self, loss: float) -> str | None:
        """What is wrong as of this step's loss; None where all is well."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if len(self.first) < self.FIRST:
            self.first.append(loss)
            return None
        start = min(self.first)
        self.high = self.high + 1 if loss > start + self.FAR else 0
        if self.high < self.patience:
            return None
        return f"the loss was above {start + self.FAR:.1f} for {self.high} steps and began at {start:.1f}"


class StopsWhenDiverging:
    """Put before a Trainer class: a loss that is not finite, or stays far above the first ones, ends the training.

    The weights that last gave a good loss are kept aside and put back. An accelerator is asked for its losses only where a
    record is due or a checkpoint is written, so that it never waits for this.
    """

    _good: tuple[int, dict[str, Tensor]] | None = None
    _last_kept = -1  # the step whose weights were put aside last

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._divergence = Divergence()
        self._unread: list[tuple[int, dict[str, Tensor] | None, Tensor]] = []  # (step, weights before it, its loss)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        step, handle = self.state.global_step, self.model  # type: ignore[attr-defined]
        due = self._last_kept < 0 or step - self._last_kept >= self.args.logging_steps  # type: ignore[attr-defined]
        weights = {n: p.detach().cpu().clone() for n, p in handle.named_parameters() if p.requires_grad} if due else None
        self._last_kept = step if due else self._last_kept
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self._unread.append((step, weights, loss.detach()))
        if due or loss.device.type == "cpu":
            self._read_losses()
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._read_losses()
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _read_losses(self) -> None:
        unread, self._unread = self._unread, []
        losses = torch.stack([loss.float() for *_, loss in unread]).tolist() if unread else []
        for (step, weights, _), loss in zip(unread, losses):
            if reason := self._divergence.reason(loss):
                raise self._lost(step, reason)
            if weights is not None and not self._divergence.high:
                self._good = (step, weights)

    def _lost(self, step: int, reason: str) -> DivergedError:
        """The error of a lost training, once the last good weights are back."""
        error = DivergedError(f"step {step + 1}: {reason}")
        if self._good is not None:
            error.good_step, weights = self._good
            for name, parameter in self.model.named_parameters():  # type: ignore[attr-defined]
                if name in weights:
                    parameter.data.copy_(weights[name])
        return error
