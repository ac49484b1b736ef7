"""Measuring held-out rows while training, and stopping early."""

from __future__ import annotations

from tunesmith.jobs.callbacks import RecordMetrics
from tunesmith.jobs.held_out import MeasureHeldOut
from tunesmith.jobs.settings import Settings


class Handle:
    """As much of a handle as is saved."""

    def __init__(self) -> None:
        self.saved = 0

    def save_pretrained(self, folder: str, is_main_process: bool) -> None:
        self.saved += 1


def measuring(tmp_path, monkeypatch, losses, **settings):
    """The callback after as many steps as there are losses, and the step that ended the training."""
    losses, handle = iter(losses), Handle()
    monkeypatch.setattr("tunesmith.jobs.held_out.mean_loss", lambda *_: next(losses))
    chosen = Settings(eval_strategy="steps", eval_steps=1, **settings)
    callback = MeasureHeldOut(handle, [{}], 0, chosen, RecordMetrics(tmp_path))
    state, control = type("State", (), {"global_step": 0, "epoch": 0.0}), type("Control", (), {"should_training_stop": False})
    callback.on_train_begin(None, state, control)
    while not control.should_training_stop:
        state.global_step += 1
        try:
            callback.on_step_end(None, state, control)
        except StopIteration:
            return callback, handle, None
    return callback, handle, state.global_step


def test_a_training_ends_when_nothing_gets_better(tmp_path, monkeypatch):
    callback, handle, ended = measuring(
        tmp_path, monkeypatch, [3.0, 2.0, 2.5, 1.9, 2.0, 1.9, 1.0], early_stopping_patience=2, load_best_model_at_end=True
    )
    assert ended == 6 and callback.stopped and callback.best == (4, 1.9) and handle.saved == 3
    again, _, ended = measuring(tmp_path, monkeypatch, [1.95, 0.5], early_stopping_patience=2)
    assert again.measured[:2] == [(1, 3.0), (2, 2.0)], "what was measured before the checkpoint counts"


def test_not_a_number_is_never_the_best(tmp_path, monkeypatch):
    callback, handle, ended = measuring(tmp_path, monkeypatch, [float("nan"), 2.0, 3.0], load_best_model_at_end=True)
    assert ended is None and callback.best == (2, 2.0) and handle.saved == 1
