"""Diverging losses end a training run; the last good weights are put back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import DivergedError
from . import processes


class Divergence:
    """Tells from the losses of steps whether a training run is lost.

    Args:
        patience: how many steps in a row must be far above the first ones.
    """

    FIRST = 3  # steps whose lowest loss counts as the start of a run
    FAR = 3.0  # nats: a perplexity twenty times as high

    def __init__(self, patience: int = 20) -> None:
        self.patience = patience
        self.first: list[float] = []
        self.high = 0

    def reason(self, loss: float) -> str | None:
        """What is wrong as of this step's loss; None where nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if len(self.first) < self.FIRST:
            self.first.append(loss)
            return None
        start = min(self.first)
        self.high = self.high + 1 if loss > start + self.FAR else 0
        if self.high < self.patience:
            return None
        return f"the loss stayed above {start + self.FAR:.1f} for {self.high} steps and began at {start:.1f}"


class StopsWhenDiverging:
    """Put before a Trainer class: a loss that is not finite, or stays far above the first ones, ends the run.

    The last weights that gave a good loss are set aside and put back. Losses on an accelerator are read only when a record
    is due or a checkpoint is written, so that it never waits for this.
    """

    # Of the Trainer class behind this one.
    args: Any
    state: Any
    model: Any

    _good: tuple[int, dict[str, Tensor]] | None = None
    _last_kept = -1  # the step whose weights were set aside last

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._divergence = Divergence()
        self._unread: list[tuple[int, dict[str, Tensor] | None, Tensor]] = []  # (step, weights before it, its loss)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        step, handle = self.state.global_step, self.model
        due = self._last_kept < 0 or step - self._last_kept >= self.args.logging_steps
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
        losses = [processes.agreed(loss) for loss in losses]
        for (step, weights, _), loss in zip(unread, losses):
            if reason := self._divergence.reason(loss):
                raise self._lost(step, reason)
            if weights is not None and not self._divergence.high:
                self._good = (step, weights)

    def _lost(self, step: int, reason: str) -> DivergedError:
        """The error of a lost run, once the last good weights are back."""
        error = DivergedError(f"step {step + 1}: {reason}")
        if self._good is not None:
            error.good_step, weights = self._good
            for name, parameter in self.model.named_parameters():
                if name in weights:
                    parameter.data.copy_(weights[name])
        return error
