"""Divergence ends a run, and the last good weights are put back."""

from __future__ import annotations

import pytest
import torch

from tunesmith.errors import DivergedError
from tunesmith.jobs import divergence


def test_what_is_told_as_divergence():
    steady = divergence.Divergence(patience=3)
    assert [steady.reason(loss) for loss in [2.0, 2.2, 1.8, 9.0, 9.0, 1.0, 9.0, 9.0]] == [None] * 8
    assert "began at 1.8" in str(steady.reason(9.0))
    assert divergence.Divergence().reason(float("nan")) == "the loss is nan"
    assert divergence.Divergence().reason(float("inf")) == "the loss is inf"


class LossElsewhere:
    """A loss on an accelerator: to read it is to wait for it."""

    device = torch.device("cuda")

    def __init__(self, value, read) -> None:
        self.value, self.read = value, read

    def detach(self):
        return self

    def float(self):
        self.read.append(self.value)
        return torch.tensor(self.value)


class Steps:
    """As much of a Trainer as takes steps; the weight before a step is the step's number."""

    def __init__(self, losses, logging_steps) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.state = type("State", (), {"global_step": 0})
        self.args = type("Arguments", (), {"logging_steps": logging_steps})
        self.losses, self.saved = losses, []

    def training_step(self, model, inputs, num_items_in_batch=None):
        return self.losses[self.state.global_step]

    def _save_checkpoint(self):
        self.saved.append(self.state.global_step)


class Measured(divergence.StopsWhenDiverging, Steps):
    def steps(self, *numbers) -> None:
        for step in numbers:
            self.state.global_step = step
            self.model.weight.data.fill_(step)
            self.training_step(self.model, {})


def test_weights_that_were_good_are_put_back():
    trainer = Measured([torch.tensor(loss) for loss in (1.0, 1.0, float("nan"))], logging_steps=1)
    trainer.steps(0, 1)
    with pytest.raises(DivergedError, match="step 3: the loss is nan") as caught:
        trainer.steps(2)
    assert caught.value.good_step == 1 and trainer.model.weight.item() == 1.0


def test_an_accelerators_losses_are_read_where_a_record_is_due_and_before_a_checkpoint():
    read = []
    trainer = Measured([LossElsewhere(loss, read) for loss in (1.0, 1.1, 1.2, 1.3, float("nan"))], logging_steps=3)
    trainer.steps(0, 1, 2)
    assert read == [1.0]
    trainer.steps(3)
    assert read == [1.0, 1.1, 1.2, 1.3]
    trainer._save_checkpoint()
    trainer.steps(4)
    assert len(read) == 4
    with pytest.raises(DivergedError, match="step 5: the loss is nan"):
        trainer._save_checkpoint()
    assert trainer.saved == [3] and trainer.model.weight.item() == 3.0
