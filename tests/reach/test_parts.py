"""Whatever module is reached through a handle, and however, computes with the handle's adapters.

One test takes a family of bases, a method, a route to a module and a way to call it; the module is one of those that the
forward calls, drawn by the test's own name, so that a failure can be run again. Its result must be that of the same module
of the merged model, on the inputs that it has within the handle's own call, and the gradients of the adapters must be those
of that call. Methods that cannot be merged are compared with the handle's own call alone.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.reach.methods import PAIRS, PREFIX, VIRTUAL_TOKENS
from tests.reach.parts import Call, Case, assert_same, assert_same_gradients, call_within, called_paths, case_of, gradients_of
from tests.reach.ways import CALLS, MODES, ROUTES, RUNNERS, Cycle, mode_of, within
from tunesmith import TunesmithError

CALLED = [f"{call}; {mode}" for call in CALLS for mode in MODES]
PER_PAIR = 4

# Where a clear error is right, too: virtual tokens stand in front of a model's inputs, not of a module's.
MAY_REFUSE = {*VIRTUAL_TOKENS, *PREFIX}

AXES = (Cycle(ROUTES), Cycle(RUNNERS), Cycle(CALLED))
COMBINATIONS = [(*pair, *(next(axis) for axis in AXES)) for pair in PAIRS for _ in range(PER_PAIR)]


@pytest.mark.each_value_once
@pytest.mark.parametrize(("family", "method", "route", "runner", "called"), COMBINATIONS)
def test_a_module_reached_through_a_handle_computes_as_within_the_handles_call(family, method, route, runner, called):
    call, mode = called.split("; ")
    case = case_of(method, family)
    path = random.Random(f"{family} {method} {route} {called}").choice(called_paths(case))
    told = f"{family}, {method}: {path} by {route}, called by {call} {runner} ({mode})"
    with mode_of(mode, *case.models) as grad:
        expected = call_within(case, path)
        args, kwargs = expected.inputs()
        try:
            part = ROUTES[route](case.handle, path)
            found = RUNNERS[runner](within(grad, lambda: CALLS[call](part, args, kwargs)))
        except TunesmithError as error:
            assert method in MAY_REFUSE, f"{told}: refused without need: {error}"
            return
        assert_same(found, expected.result, f"{told}: another result than within the handle's call")
        if case.merged is not None:
            assert_same(found, _merged(case, path, expected), f"{told}: another result than the merged model's")
        if grad is torch.enable_grad and route != "a deep copy":  # which has parameters of its own
            assert_same_gradients(gradients_of(case, found), expected.gradients, told)
    case.assert_bare()


def _merged(case: Case, path: str, call: Call) -> Any:
    args, kwargs = call.inputs()
    with torch.no_grad():
        return case.merged.get_submodule(path)(*args, **kwargs)
