"""What a handle sets on its base is there during its calls, on every thread, and gone after."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tests.handles import lora
from tunesmith import UsageError
from tunesmith.runtime import own_state
from tunesmith.runtime.frame import entered


class Modes(nn.Module):
    """Answers with the mode in which it ran, and can wait in the middle of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.gate: threading.Event | None = None
        self.running = threading.Event()

    def forward(self, x):
        before = self.training
        self.running.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        assert self.training is before, "the mode changed in the middle of a call"
        return self.inner(x) * 0 + float(self.training)


X = torch.ones(1, 2)


def pair():
    base = Modes().eval()
    return base, lora(base, target_modules=["inner"]).train(), lora(base, target_modules=["inner"]).eval()


def held(base, handle, pool):
    """A call on another thread that has begun, and goes on when `base.gate` is set."""
    base.gate = threading.Event()
    base.running.clear()
    call = pool.submit(handle, X)
    assert base.running.wait(20)
    return call


def test_a_call_in_another_mode_on_another_thread_waits():
    base, trains, evaluates = pair()
    for handle in (trains, evaluates):
        handle(X)
    with ThreadPoolExecutor(2) as pool:
        first = held(base, trains, pool)
        second = pool.submit(evaluates, X)
        assert not second.done()
        base.gate.set()
        assert bool((first.result() == 1).all()) and bool((second.result() == 0).all())
    assert not base.training and not base.inner.training


def test_calls_in_one_mode_run_at_the_same_time():
    base, _, evaluates = pair()
    other = lora(base, target_modules=["inner"]).eval()
    for handle in (other, evaluates):
        handle(X)
    with ThreadPoolExecutor(2) as pool:
        first = held(base, other, pool)
        base.running.clear()
        second = pool.submit(evaluates, X)
        assert base.running.wait(20), "the second call waited for the first"
        base.gate.set()
        first.result(), second.result()


def test_a_call_that_waits_too_long_is_an_error(monkeypatch):
    monkeypatch.setattr(own_state, "PATIENCE", 0.05)
    base, trains, evaluates = pair()
    with entered(trains.effective_frame), ThreadPoolExecutor(1) as pool:
        with pytest.raises(UsageError, match="another thread"):
            pool.submit(evaluates, X).result()
        assert base.training
    assert not base.training and bool((evaluates(X) == 0).all())


def test_a_call_inside_a_call_has_its_own_mode():
    base, trains, evaluates = pair()
    seen = []
    trains.base_model.inner.register_forward_hook(lambda *_: seen.append(evaluates(X)[0, 0].item()))
    assert bool((trains(X) == 1).all()) and seen == [0.0]
    assert not base._forward_hooks and not base.inner._forward_hooks


def test_an_exception_leaves_nothing_behind():
    base, trains, _ = pair()
    base.gate = "no gate"
    with pytest.raises(AttributeError):
        trains(X)
    assert not any(module.training for module in base.modules())


def test_values_of_a_handle_are_seen_by_its_own_calls_alone():
    base = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    first, second = (lora(base, seed, target_modules=["0"]).train() for seed in (1, 2))
    for module in first.base_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.ones(3, 4)
    assert torch.equal(first(x), first(x)) and not torch.equal(second(x), second(x))
    assert base[1].p == 0.5 and first.base_model[1].p == 0.0 and second.base_model[1].p == 0.5


class Counts(nn.Module):
    """A method that sets what the forward reads, and a forward that sets what methods read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.offset, self.calls = 0, 0

    def forward(self, x):
        self.calls = self.calls + 1
        return self.inner(x) * 0 + self.offset

    def run(self, x, offset):
        self.offset = offset
        self.calls = 0
        first = self(x)
        self.offset = offset + 1
        return first, self(x), self.calls


def test_what_a_method_sets_in_the_middle_of_a_call_acts_from_there_on():
    base = Counts()
    handle = lora(base, target_modules=["inner"]).eval()
    handle(X)
    with entered(handle.effective_frame):
        first, second, calls = handle.base_model.model.run(X, 5)
    assert first[0, 0] == 5 and second[0, 0] == 6 and calls == 2
    assert base.offset == 0 and handle.base_model.model.offset == 6
    first, second, calls = handle.run(X, 8)
    assert first[0, 0] == 8 and second[0, 0] == 9 and calls == 2 and base.offset == 0
